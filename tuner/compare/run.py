"""Runs a comparison: every strategy at every size, then what each would have handed over when."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

import kvtune
from kvtune.common.errors import KvtuneError
from kvtune.common.files import sha256, write_json
from kvtune.common.lock import locked
from kvtune.common.progress import Progress, Silent
from kvtune.common.stored import read_json
from kvtune.tuner.compare.held_out import HeldOut
from kvtune.tuner.compare.ledger import Ledger
from kvtune.tuner.compare.result import Comparison, Outcome, Point, Times
from kvtune.tuner.compare.setting import Prepared, Setting, live_runs, prepare
from kvtune.tuner.compare.strategies import STRATEGIES, Strategy
from kvtune.tuner.compare.written import write_comparison
from kvtune.tuner.exchange import Choice
from kvtune.tuner.quality import estimate, ratio_interval
from kvtune.tuner.request import SearchRequest
from kvtune.tuner.solver import policy_of
from kvtune.tuner.sources import QualitySource
from kvtune.tuner.which_menu import with_menu

POINTS = 6  # of a strategy's curve that run on the held-out samples


@dataclass(frozen=True)
class CompareRequest:
    """What is compared.

    Args:
        search: what ``tuner`` is asked; its model, samples, menu and seed are everyone's.
        shares: of the bf16 bytes of a prompt that plans may take.
        seconds: that every strategy has at every size.
        strategies: by name.
    """

    search: SearchRequest
    shares: tuple[float, ...]
    seconds: float
    strategies: tuple[str, ...] = tuple(STRATEGIES)


@dataclass(frozen=True)
class Incumbent:
    """What a strategy would have handed over from some second on."""

    seconds: float
    choice: Choice


def run_comparison(request: CompareRequest, progress: Progress | None = None) -> Comparison:
    """Run what is not on file, and write the result after every strategy.

    Raises:
        KvtuneError: the weights are not at hand, or the folder holds another comparison.
    """
    progress = progress or Silent()
    request = replace(request, search=with_menu(request.search)[0])
    with locked(request.search.run_dir):
        _record_config(request)
        from kvtune.traces.models import best_device, load_model
        from kvtune.traces.workloads import named_workload

        search = request.search
        loaded = load_model(search.model, device=search.device or best_device(), progress=progress)
        workload = named_workload(search.workload, search.seed, search.texts)
        source, prepared = prepare(search, workload, loaded, progress)
        for part in comparison(request, source, prepared, progress):
            write_comparison(part, request.search)
    return part


def comparison(
    request: CompareRequest,
    source: QualitySource,
    prepared: Prepared,
    progress: Progress,
    now: Callable[[], float] = time.monotonic,
) -> Iterator[Comparison]:
    """The comparison after every strategy, timed by the clock ``now``."""
    outcomes: list[Outcome] = []
    for share in request.shares:
        setting = Setting(request.search, source, share, prepared)
        held_out = HeldOut(setting)
        plans: dict[str, Sequence[float]] = {}
        for name in request.strategies:
            progress.note(f"{STRATEGIES[name].words} at {100 * share:g} % of the bytes")
            ledger = _ledger(setting, name, now)
            found = run_strategy(STRATEGIES[name], setting, ledger, request.seconds, progress)
            outcomes.append(_outcome(name, setting, ledger, held_out, found, plans))
            yield Comparison(
                model=request.search.shape.name,
                device=source.loaded.device if source.loaded else "",
                workload=request.search.workload,
                seconds=request.seconds,
                prepared=prepared,
                held_out_samples=len(setting.kinds("evaluate")),
                outcomes=tuple(outcomes),
            )


def _ledger(setting: Setting, name: str, now: Callable[[], float]) -> Ledger:
    start_s = setting.prepared.seconds if STRATEGIES[name].reads_tables else 0.0
    runs = live_runs(setting.source, "select")
    return Ledger(setting.folder / f"{name}.jsonl", runs, start_s, now)


def run_strategy(
    strategy: Strategy, setting: Setting, ledger: Ledger, seconds: float, progress: Progress
) -> list[Incumbent]:
    """What it would have handed over as time went on; nothing that it found after the time."""
    found: list[Incumbent] = []
    try:
        for choice in progress.track(strategy.search(setting, ledger), strategy.words):
            if ledger.seconds > seconds:
                break
            if not found or not np.array_equal(found[-1].choice, choice):
                found.append(Incumbent(ledger.seconds, choice))
    except KvtuneError as error:
        progress.note(f"{strategy.words}: {error}")
    return found


def _outcome(
    name: str,
    setting: Setting,
    ledger: Ledger,
    held_out: HeldOut,
    found: Sequence[Incumbent],
    plans: dict[str, Sequence[float]],
) -> Outcome:
    """A strategy's curve; ``plans`` holds the losses of those before it, and takes its own."""
    strategy, shown, kinds = STRATEGIES[name], thinned(found), setting.kinds("evaluate")
    losses = held_out.losses([each.choice for each in shown])
    points = [
        Point(each.seconds, estimate(loss, kinds, "live"))
        for each, loss in zip(shown, losses, strict=True)
    ]
    if losses:
        plans[name] = losses[-1]
    times = None
    if name in plans and "tuner" in plans:
        times = Times(*ratio_interval(plans[name], plans["tuner"], kinds))
    last = shown[-1].choice if shown else None
    return Outcome(
        strategy=name,
        words=strategy.words,
        asked_share=setting.share,
        share=None if last is None else setting.share_of(last),
        plans_run=ledger.used,
        points=tuple(points),
        times_the_tuner=times,
        policy=None if last is None else policy_of(setting.tables, last, strategy.words),
    )


def thinned(found: Sequence[Incumbent]) -> list[Incumbent]:
    """The first, the last, and a few between them, evenly in the logarithm of the time."""
    if len(found) <= POINTS:
        return list(found)
    seconds = np.log([max(each.seconds, 1e-3) for each in found])
    wanted = np.linspace(seconds[0], seconds[-1], POINTS)
    return [found[row] for row in sorted({int(np.abs(seconds - at).argmin()) for at in wanted})]


def _record_config(request: CompareRequest) -> None:
    """Write what the folder's runs are of.

    Raises:
        KvtuneError: it holds runs of another model, other samples or another menu.
    """
    search, path = request.search, request.search.run_dir / "config.json"
    config: dict[str, Any] = {
        "model": search.shape.name, "workload": search.workload, "menu": search.menu,
        "seed": search.seed, "trials": search.trials,
        "texts": [sha256(text) for text in search.texts], "kvtune": kvtune.__version__,
    }  # fmt: skip
    if not path.exists():
        write_json(path, config)
    elif (known := read_json(path)) != config:
        others = [name for name in config if known.get(name) != config[name]]
        raise KvtuneError(
            f"this folder holds a comparison with another {', '.join(others)}",
            where=str(path),
            hint="choose another folder with --out.",
        )
