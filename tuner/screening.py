"""Which of many methods are replayed in full: those that together lose least, head by head.

A layer of a sample takes a CPU 19 seconds with the menu of all methods, and a search has hundreds
of them. Most methods are the best for hardly any head. All are therefore tried in one precision and
at three budgets on a few layers, each kind of text once; what goes on is chosen one by one, each
time the method that lowers most what heads lose if each has the best of the chosen ones in as many
bytes: some methods store the tokens too that others let go.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from kvtune.common.errors import KvtuneError
from kvtune.common.files import write_json
from kvtune.common.kept import NOTHING_KEPT, Kept
from kvtune.common.progress import Progress
from kvtune.common.stored import checked, read_json
from kvtune.policies.formats.grouped import Int4
from kvtune.policies.method import Method
from kvtune.policies.option import Budget, Option
from kvtune.simulator.quality.tables import Floats
from kvtune.tuner.options import METHODS, Menu

if TYPE_CHECKING:
    from kvtune.traces.trace import SampleRecord, Trace

MOST = 7
"""Methods that go on, those of the smaller menu among them; more where more must. On SmolLM2 seven
lose 1.02 times what all 22 do together, on layers that did not choose them 1.05
(``benchmarks/results/screening-cpu.json``)."""
_EVERY = 6  # layers
_NEARLY = 1.1  # of the bytes of a budget: some keep a weight for every token
_FORM = Int4(exact_first=4)


@dataclass(frozen=True)
class _Kept:
    """What was found, as a file holds it: labels of the methods, and of how many."""

    methods: tuple[str, ...]
    of: int


def screened(menu: Menu, trace: Trace, kept: Path, device: str, progress: Progress) -> Menu:
    """A menu with the methods that go on; the same again where a file holds what was found.

    Args:
        menu: with all methods.
        trace: of the model, with the signals of all of them.
        kept: folder of what was found.
        device: where the arithmetic runs.
        progress: told of every layer.
    """
    told = hashlib.sha256(repr((menu.methods, menu.shares)).encode()).hexdigest()[:12]
    file = kept.with_name(f"{kept.name}-{told}-methods.json")
    if (found := _kept(file, menu, progress)) is not None:
        return replace(menu, methods=found)
    sure = [m for m in menu.methods if m in METHODS or m.reader(1) is not None]
    parts = Kept(file.with_suffix(".parts"), (told, device))
    losses = losses_of_methods(menu, trace, device, progress, parts)
    methods = covering(losses, menu.methods, sure, MOST)
    names = [method.label for method in methods]
    progress.note(f"of {len(menu.methods)} methods these are replayed in full: {', '.join(names)}.")
    write_json(file, {"methods": names, "of": len(menu.methods)})
    parts.clear()
    return replace(menu, methods=methods)


def _kept(file: Path, menu: Menu, progress: Progress) -> tuple[Method, ...] | None:
    """The methods that a file names; None where there is no file, or it is damaged."""
    if not file.exists():
        return None
    try:
        names = set(checked(_Kept, read_json(file), str(file)).methods)
        if not names or names - {method.label for method in menu.methods}:
            raise KvtuneError("names no methods of the menu", where=str(file))
    except KvtuneError as error:
        progress.note(f"{error}. The search goes on and writes it again.")
        return None
    return tuple(method for method in menu.methods if method.label in names)


def covering(
    losses: Floats, methods: Sequence[Method], sure: Collection[Method], most: int
) -> tuple[Method, ...]:
    """Some of the methods, in their order: the sure ones, and what lowers most the least losses.

    Args:
        losses: of every method, budget and head, ``[M, B, I]``; budgets count alike.
        methods: M of them.
        sure: those that are kept whatever they lose.
        most: how many in all, or as many as are sure; fewer where no other lowers anything.
    """
    scaled = losses / np.maximum(losses.min(0).sum(-1), 1e-12)[:, None]
    chosen = [row for row, method in enumerate(methods) if method in sure]
    while len(chosen) < min(most, len(methods)):
        least = scaled[chosen].min(0) if chosen else np.full_like(scaled[0], np.inf)
        best = int(np.minimum(scaled, least).sum((1, 2)).argmin())
        if not (scaled[best] < least).any():
            break
        chosen.append(best)
    return tuple(methods[row] for row in sorted(chosen))


def losses_of_methods(
    menu: Menu, trace: Trace, device: str, progress: Progress, kept: Kept = NOTHING_KEPT
) -> Floats:
    """Of every method within three budgets of bytes, on heads of a few layers, ``[M, B, I]``."""
    from kvtune.simulator.quality.build import DEFAULT_BLOCK, layer_features, load_layer

    samples, depth = _one_of_each_kind(trace), trace.geometry.layers
    shares = _spread(menu.shares)
    options = [
        Option(method, Budget(share=share), _FORM, _FORM)
        for method in menu.methods
        for share in shares
    ]
    cells = [
        (sample.id, layer)
        for sample in samples
        for layer in range(min(_EVERY // 2, depth - 1), depth, _EVERY)
    ]
    found = {cell: arrays["losses"] for cell in cells if (arrays := kept.get(cell))}
    waiting = [cell for cell in cells if cell not in found]
    for cell in progress.track(waiting, "trying methods", len(waiting)):
        loaded = load_layer(trace, *cell, options, device)
        found[cell] = (layer_features(loaded, options, DEFAULT_BLOCK) ** 2).sum(-1)
        kept.put({"losses": found[cell]}, cell)
    each = np.concatenate([found[cell] for cell in cells]).T.reshape(
        len(menu.methods), len(shares), -1
    )
    prompt, head_dim = samples[0].prompt, trace.geometry.head_dim
    taken = [o.footprint(o.budget.resolve(prompt), prompt, head_dim) for o in options]
    return within_bytes(each, np.reshape(taken, each.shape[:2]))


def within_bytes(losses: Floats, taken: NDArray[np.int64]) -> Floats:
    """The least loss of every method in as few bytes as any method takes at a budget, or nearly.

    A method that takes more at all of its budgets loses as much as the worst that does not.

    Args:
        losses: of every method, budget and head, ``[M, B, I]``, smallest budget first.
        taken: bytes of a head, ``[M, B]``.
    """
    allowed = _NEARLY * taken.min(0)
    fits = taken[:, None] <= allowed[:, None]  # [M, B allowed, B of a method]
    least = np.where(fits[..., None], losses[:, None], np.inf).min(2)
    worst = np.where(np.isfinite(least), least, 0).max(0)
    return np.asarray(np.where(np.isfinite(least), least, worst), np.float32)


def _spread(shares: Sequence[float]) -> list[float]:
    """Three of the shares, the largest among them, evenly apart; fewer where there are fewer."""
    count = len(shares)
    return sorted({shares[count - 1 - part * count // 3] for part in range(min(count, 3))})


def _one_of_each_kind(trace: Trace) -> list[SampleRecord]:
    samples = trace.of_split("search") or trace.of_split("select")
    return list({sample.kind: sample for sample in reversed(samples)}.values())
