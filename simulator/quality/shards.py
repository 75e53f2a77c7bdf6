"""Tables built by many processes or machines: one layer of a few samples each.

The engine is any ``concurrent.futures.Executor``, as for ``traces.shards``. The cells are those of
one process, which on a GPU hold several samples side by side, replayed by the same code and put
where they belong: on devices that compute alike the tables are the same to the bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Executor
from functools import cache
from pathlib import Path

from kvtune.common.processes import own_device
from kvtune.common.progress import Progress, Silent
from kvtune.policies.option import Option
from kvtune.simulator.quality.build import (
    DEFAULT_BLOCK,
    Cell,
    assembled,
    cells_of,
    layer_features,
    load_cell,
)
from kvtune.simulator.quality.tables import Floats, Tables
from kvtune.traces.trace import Trace, open_trace


def build_tables_on(
    engine: Executor,
    trace: Trace,
    options: Sequence[Option],
    *,
    block: int = DEFAULT_BLOCK,
    device: str = "cpu",
    progress: Progress | None = None,
    trusted: bool = False,
) -> Tables:
    """What ``build_tables`` makes, replayed by the engine's workers.

    Args:
        engine: runs the cells; its workers reach the trace's folder.
        trace: captured with probes.
        options: what to replay.
        block: positions whose responses are summed before squaring.
        device: of workers that were given none of their own (``common.processes``).
        progress: told of every (sample, layer).
        trusted: the workers are this process's own, which need not hash what it has hashed.
    """
    cells = cells_of(trace, trace.samples, options, device)
    given = tuple(options), block, device, trace.checked if trusted else frozenset()
    waiting = [engine.submit(replay_cell, trace.root, cell, *given) for cell in cells]
    tracked = (progress or Silent()).track(waiting, "replaying options", len(waiting))
    found = [part.result() for part in tracked]
    return assembled(trace, trace.samples, options, cells, found)


def replay_cell(
    root: Path,
    cell: Cell,
    options: Sequence[Option],
    block: int,
    device: str,
    checked: frozenset[str] = frozenset(),
) -> Floats:
    """One cell, by a worker."""
    trace = trace_once(root, checked)
    loaded = load_cell(trace, trace.samples, cell, options, own_device(device))
    return layer_features(loaded, options, block)


@cache
def trace_once(root: Path, checked: frozenset[str]) -> Trace:
    """The worker's trace: files that were checked once, here or by the caller, are not hashed."""
    return open_trace(root, map(Path, checked))
