"""Finds how decode attention is best compiled and cut on this GPU, for each class of layers.

From the built-in shape one parameter is changed at a time and the best kept, until none is better.
A class's score is the geometric mean over its layers, so that each counts alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial

from kvtune.policies.pages import PageLayout
from kvtune.profiles.tuned import Class, TunedShape
from kvtune.runtime.kernels.launch import BUILT_IN, Shape, decode
from kvtune.runtime.kernels.tiles import kind_of
from kvtune.runtime.measure.operation import Work
from kvtune.runtime.measure.paged_layer import Run, random_layer
from kvtune.runtime.measure.timer import Timer

TRIED: dict[str, tuple[int | None, ...]] = {
    "programs": (None, 264, 396, 528, 792, 1056, 1584, 2112),
    "stages": (2, 3, 4),
    "warps": (1, 2, 4),
    "registers": (None, 168),
}
"""Values of each of the kernel's parameters, those that do not compile anew first."""

BETTER = 0.99
"""A change that gains less than this is noise."""

KV_HEADS, GROUP, BATCH = 8, 4, 8
ROTATION_BYTES = 256 << 20
NEW_TOKENS = 100

Head = tuple[int, str, str]
"""Tokens of a head, and the formats of its keys and values."""

PLANNED: dict[int, tuple[Head, ...]] = {
    4: (
        (1170, "int4", "int4"), (878, "int4", "int4"), (878, "int4", "int4"),
        *3 * ((16384, "int4", "int4"),), *2 * ((8192, "int4", "int4"),),
    ),
    14: (
        *3 * ((8192, "int4", "int2"),), *3 * ((585, "bf16", "bf16"),),
        *2 * ((8192, "int4", "int4"),),
    ),
    28: (
        *3 * ((8192, "int4", "int4"),), *3 * ((16384, "int4", "int4"),),
        *2 * ((1755, "bf16", "bf16"),),
    ),
}  # fmt: skip
"""What a search for Llama-8B left in some layers: made-up heads led to cuts that suit no plan."""


@dataclass(frozen=True)
class Case:
    """A layer to tune for.

    Args:
        name: of it, for provenance.
        runs: what it holds.
    """

    name: str
    runs: Sequence[Run]

    @property
    def pairs(self) -> tuple[int, ...]:
        """Pairs of key and value formats that occur."""
        return tuple(sorted({run.layout.code for run in self.runs}, reverse=True))

    @property
    def held_bytes(self) -> int:
        """Bytes of the pages that it holds."""
        return sum(run.pages * run.layout.page_bytes for run in self.runs)


Seconds = Callable[[Case, Shape], float]
"""What one launch over a case takes; ``inf`` for a shape that does not run."""


def cases(head_dim: int) -> list[Case]:
    """Layers of 8 sequences, small and large; mixed ones as plans leave them."""
    rows = range(BATCH * KV_HEADS)
    made = []
    for form in ("bf16", "fp8", "int4"):
        layout = PageLayout(head_dim, form, form)
        for tokens in (2048, 16384):
            name = f"{form}, {len(rows)} rows of {tokens} tokens"
            made.append(Case(name, [Run(row, layout, tokens) for row in rows]))
    for number, heads in PLANNED.items():
        made.append(Case(f"layer {number} of a plan at 12 % of 32k", _planned(head_dim, heads)))
    return made


def _planned(head_dim: int, heads: Sequence[Head]) -> list[Run]:
    """Each head of every sequence, with its new tokens in 16 bits."""
    runs = []
    for row in range(BATCH * KV_HEADS):
        tokens, keys, values = heads[row % KV_HEADS]
        runs.append(Run(row, PageLayout(head_dim, keys, values), tokens))
        runs.append(Run(row, PageLayout(head_dim), NEW_TOKENS))
    return runs


def tune(
    head_dim: int, kinds: Collection[str], seconds: Seconds, going: Callable[[], bool]
) -> dict[Class, TunedShape]:
    """The best shapes for one head dimension.

    Args:
        head_dim: D.
        kinds: of layers, those that are wanted.
        seconds: times a launch.
        going: whether there is time left; a class that was not finished is left out.
    """
    by_kind: dict[str, list[Case]] = {}
    for case in cases(head_dim):
        by_kind.setdefault(kind_of(case.pairs), []).append(case)
    found = {(kind, head_dim): tune_class(by_kind[kind], seconds, going) for kind in kinds}
    return {key: best for key, best in found.items() if best}


def tune_class(
    some: Sequence[Case], seconds: Seconds, going: Callable[[], bool]
) -> TunedShape | None:
    """The best shape for layers of one kind; None if time was up before it was found."""
    before = [seconds(case, BUILT_IN) for case in some]
    if math.inf in before:
        return None

    def share(shape: Shape) -> float:
        """Of the built-in shape's time."""
        ratios = [seconds(case, shape) / was for case, was in zip(some, before, strict=True)]
        return math.exp(sum(map(math.log, ratios)) / len(ratios))

    found = _descend(share, going)
    if found is None:
        return None
    best, score = found
    numbers = {name: value for name, value in asdict(best).items() if value is not None}
    return TunedShape(numbers, round(score, 4), tuple(case.name for case in some))


def _descend(
    share: Callable[[Shape], float], going: Callable[[], bool]
) -> tuple[Shape, float] | None:
    """The best shape and its score; no shape is tried twice."""
    best, score, tried = BUILT_IN, 1.0, {BUILT_IN}
    improved = True
    while improved:
        improved = False
        for name, value in ((name, value) for name, some in TRIED.items() for value in some):
            shape = replace(best, **{name: value})  # type: ignore[arg-type]
            if shape in tried:
                continue
            if not going():
                return None
            tried.add(shape)
            if (other := share(shape)) < BETTER * score:
                best, score, improved = shape, other, True
    return best, score


def timed_by(timer: Timer, device: str) -> Seconds:
    """Times cold launches in a graph.

    Args:
        timer: the GPU's.
        device: where layers are made.
    """

    def seconds(case: Case, shape: Shape) -> float:
        count = max(2, -(-ROTATION_BYTES // case.held_bytes))
        try:
            layers = [random_layer(case.runs, GROUP, device, shape.programs) for _ in range(count)]
            calls = [
                partial(decode, one.query, one.paged, one.scratch, one.scale, shape=shape)
                for one in layers
            ]
            timing = timer(Work(calls, case.held_bytes), "graph", lambda: None)
        except Exception:  # a shape may want more registers or shared memory than there are
            return math.inf
        return timing.median_us * 1e-6

    return seconds
