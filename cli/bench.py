"""``kvtune bench``: all policies beside each other at equal bytes, live."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvtune.cli import options
from kvtune.cli.output import speaking, table

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import RenderableType

    from kvtune.common.estimate import Estimate
    from kvtune.traces.models import LoadedModel
    from kvtune.traces.samples import Sample
    from kvtune.tuner.bench_runs import Run
    from kvtune.tuner.leaderboard import Board, Standing


OutOption = Annotated[
    Path, typer.Option("--out", metavar="DIR", help="Folder of the runs; continued if begun.")
]
MethodsOption = Annotated[
    str, typer.Option("--methods", metavar="NAMES", help="Some policies: snapkv,h2o.")
]
PerKindOption = Annotated[
    int | None,
    typer.Option("--samples", metavar="N", min=1, help="Samples of each kind of text."),
]
StoredOption = Annotated[
    str, typer.Option("--format", metavar="NAME", help="How keys and values are stored.")
]


def command(
    model: options.Model = "smollm2-135m",
    out: OutOption = Path("kvtune-bench"),
    methods: MethodsOption = "",
    shares: options.Shares = "5%,10%,20%,40%",
    per_kind: PerKindOption = None,
    stored: StoredOption = "bf16",
    workload: options.HeldOut = "small",
    text: options.Texts = None,
    seed: options.Seed = 0,
    device: options.Device = None,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """All policies beside each other at equal bytes, live."""
    from kvtune.cli.inputs import check_writable, read_shares
    from kvtune.tuner.bench_entries import entries

    check_writable(out, "--out")
    wanted, form = read_shares(shares), _format(stored)
    chosen = entries([each.strip() for each in methods.split(",") if each.strip()])
    from kvtune.tuner.target import read_texts, read_weights  # after what is checked without them

    name, texts = read_weights(model)[0], read_texts(text or ())
    with speaking(as_json, quiet) as output:
        from kvtune.traces.models import best_device, load_model
        from kvtune.tuner.bench import bench
        from kvtune.tuner.leaderboard import on_board, standings, too_large

        loaded = load_model(
            name,
            device=device or best_device(),
            dtype="float32",  # so that differences are the policies' and not rounding's
            progress=output.progress,
        )
        samples = _samples(loaded, workload, seed, texts, per_kind)
        runs = bench(loaded, samples, chosen, wanted, out, form=form, progress=output.progress)
        found = standings(runs)
        for share in wanted:
            for board in ("held", "read") if any(s.reads_less for s in found) else ("held",):
                output.show(_table(board, share, on_board(board, found, share)), "")
            if missing := too_large(found, share):
                output.show(f"cannot be filled to {100 * share:g} %: {', '.join(missing)}", "")
        output.show(_full(runs))
        output.finish("bench", _answer(loaded, found, runs, out))


def _format(name: str) -> Any:
    from kvtune.common.errors import KvtuneError, nearest
    from kvtune.policies.format import formats

    if name not in formats():
        raise KvtuneError(f"unknown format {name!r}", hint=nearest(name, formats()))
    return formats()[name]()


def _samples(
    loaded: LoadedModel, workload: Any, seed: int, texts: Sequence[Path], per_kind: int | None
) -> list[Sample]:
    """The held-out samples of a workload; no others are made."""
    from dataclasses import replace

    from kvtune.traces.workloads import build, named_workload

    plan = named_workload(workload, seed, texts)
    kinds = plan.counts["evaluate"]
    held_out = {kind: per_kind or count for kind, count in kinds.items()}
    return build(replace(plan, counts={"evaluate": held_out}), loaded.tokenizer)


def _table(board: Board, share: float, rows: Sequence[Standing]) -> RenderableType:
    """Everyone at equal bytes; on the board of bytes read, those too that hold everything."""
    from kvtune.common.words import accuracy, figure

    shown = [
        (
            standing.policy + ("*" if standing.looks_ahead else ""),
            f"{100 * standing.taken:.2f} %",
            f"{100 * standing.read:.2f} %",
            figure(standing.kl, tier=False),
            *(accuracy(each) for each in (standing.after, standing.known, standing.second)),
        )
        for standing in rows
    ]
    columns = ("policy", "held", "read", "KL nats/token", "after", "before", "second")
    return table(f"At {100 * share:g} % of the bf16 bytes {board}", columns, shown)


def _full(runs: Sequence[Run]) -> str:
    from kvtune.common.words import accuracy
    from kvtune.tuner.leaderboard import full_cache

    after, known, second = (accuracy(each) for each in full_cache(runs))
    return (
        f"full cache: after {after}, before {known}, second {second}\n"
        "live, on held-out samples, 95 % intervals; * looks ahead: a reference, no policy\n"
        "answers, digits right: all questions after compression; one before it; then a second one"
    )


def _answer(
    loaded: LoadedModel, found: Sequence[Standing], runs: Sequence[Run], out: Path
) -> dict[str, Any]:
    from kvtune.tuner.leaderboard import full_cache

    names = ("asked_after", "asked_before", "second_question")
    full: dict[str, Estimate | None] = dict(zip(names, full_cache(runs), strict=True))
    return {
        "model": loaded.name,
        "device": loaded.device,
        "dtype": loaded.dtype,
        "out": out,
        "full_cache": full,
        "standings": found,
    }
