"""What all strategies share: the model with its trace and tables, and the bytes of a plan."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from kvtune.common.bounds import NotNegative
from kvtune.common.files import write_json
from kvtune.common.progress import Progress
from kvtune.common.stored import checked, read_json
from kvtune.policies.policy import Policy, footprint_of_lengths
from kvtune.simulator.quality.tables import Tables
from kvtune.simulator.quality.tables_file import load_tables, save_tables
from kvtune.tuner import source_models
from kvtune.tuner.allocate import Problem
from kvtune.tuner.compare.ledger import RunChoices
from kvtune.tuner.exchange import Choice
from kvtune.tuner.request import SearchRequest
from kvtune.tuner.solver import policy_of
from kvtune.tuner.sources import QualitySource, menu_of, queries_of, signals_of

if TYPE_CHECKING:
    from kvtune.policies.option import Option
    from kvtune.traces.models import LoadedModel
    from kvtune.traces.trace import Trace
    from kvtune.traces.workloads import Workload

PROBES = {"small": 4, "mixed": 4, "full": 16}


@dataclass(frozen=True)
class Prepared:
    """Seconds that the trace and the tables took, which every strategy that reads them pays."""

    capture_s: NotNegative
    tables_s: NotNegative

    @property
    def seconds(self) -> float:
        """Seconds for capture and tables together."""
        return self.capture_s + self.tables_s


@dataclass(frozen=True)
class Setting:
    """A model, its samples, and what a prompt may take.

    Args:
        request: what a search of this kind would be asked; the strategy ``tuner`` is one.
        source: tables, trace and the loaded model.
        share: of the bf16 bytes of a prompt that a plan may take.
        prepared: what trace and tables took.
    """

    request: SearchRequest
    source: QualitySource
    share: float
    prepared: Prepared

    @property
    def folder(self) -> Path:
        """Where the runs of this size are kept."""
        return self.request.run_dir / f"{100 * self.share:g}%"

    @property
    def tables(self) -> Tables:
        """The tables of the samples of every split."""
        return self.source.tables

    @property
    def full_bytes(self) -> int:
        """Of an uncompressed prompt in bf16."""
        return 4 * self.tables.prompt_tokens * self.tables.head_dim * self.tables.heads

    @property
    def budget(self) -> int:
        """Bytes for all heads' entries; the heads' lengths have been taken off."""
        return int(self.share * self.full_bytes) - footprint_of_lengths(1, self.tables.heads)

    @cached_property
    def footprints(self) -> NDArray[np.int64]:
        """Bytes of one head's prompt under each option, ``[O]``."""
        return self.tables.footprints(self.tables.prompt_tokens, self.tables.head_dim)

    @cached_property
    def problem(self) -> Problem:
        """The tables of the search samples, reduced for allocation."""
        return Problem.of(self.tables.of_split("search"), self.footprints)

    def per_head(self, by_layer: Choice) -> Choice:
        """One option a layer, ``[L]``, as one a head, ``[I]``."""
        return np.repeat(by_layer, self.tables.kv_heads)

    def share_of(self, choice: Choice) -> float:
        """What a configuration takes of the bf16 bytes, lengths included."""
        held = int(self.footprints[choice].sum()) + footprint_of_lengths(1, self.tables.heads)
        return held / self.full_bytes

    def kinds(self, split: str) -> list[str]:
        """The kind of text of every sample of a split."""
        known = self.source.trace.samples if self.source.trace else self.tables.samples
        return [sample.kind for sample in known if sample.split == split]


def prepare(
    request: SearchRequest, workload: Workload, loaded: LoadedModel, progress: Progress
) -> tuple[QualitySource, Prepared]:
    """Trace and tables in the run directory, timed; those that are finished are used again.

    What an interruption left is made anew, so that the seconds are those of the whole work. No
    tables are made of held-out samples: nobody needs them.

    Args:
        request: its menu and seed count.
        workload: the samples.
        loaded: the model.
        progress: told of every step.
    """
    from kvtune.traces.calibration import find_calibration
    from kvtune.traces.capture import capture
    from kvtune.traces.trace import open_trace
    from kvtune.traces.workloads import build

    folder = request.run_dir
    done, traced, tables_file = (
        folder / name for name in ("prepared.json", "trace", "tables.safetensors")
    )
    menu = menu_of(request, calibrated=find_calibration(loaded.fingerprint) is not None)
    if not done.is_file():
        shutil.rmtree(traced, ignore_errors=True)
        started = time.monotonic()
        trace = capture(
            loaded,
            build(workload, loaded.tokenizer),
            traced,
            probes=PROBES[request.workload],
            seed=request.seed,
            workload_description=workload.describe(),
            signals=signals_of(menu.needs),
            queries=queries_of(menu.needs, workload.observed),
            progress=progress,
        )
        captured = time.monotonic()
        _make_tables(trace, menu.options(), tables_file, loaded.device, progress)
        took = Prepared(captured - started, time.monotonic() - captured)
        write_json(done, asdict(took))
    trace = open_trace(traced)
    source = QualitySource(
        load_tables(tables_file)[0],
        source_models.packaged_calibration(),
        loaded=loaded,
        trace=trace,
        provenance={"trace": trace.content_sha256},
    )
    return source, checked(Prepared, read_json(done), str(done))


def _make_tables(
    trace: Trace, options: Sequence[Option], path: Path, device: str, progress: Progress
) -> None:
    from kvtune.simulator.quality.build import build_tables

    seen = [sample for sample in trace.samples if sample.split != "evaluate"]
    tables = build_tables(trace, options, samples=seen, device=device, progress=progress)
    save_tables(tables, path, {"trace": trace.content_sha256})


def live_runs(source: QualitySource, split: str) -> RunChoices:
    """How configurations run live on a split's samples.

    Each sample's prompt is read from the trace once; nobody's clock is charged for reading it.
    """
    from kvtune.runtime.prompts import traced_prompt
    from kvtune.tuner.validate import validate_policies

    trace, loaded = source.trace, source.loaded
    assert trace is not None  # noqa: S101 - prepare gives both
    assert loaded is not None  # noqa: S101
    samples = trace.of_split(split)
    prompts = {
        sample.id: cache(traced_prompt(trace, trace.sample(sample.id), loaded.device, probes=False))
        for sample in samples
    }

    def run(choices: Sequence[Choice]) -> list[Sequence[float]]:
        policies: list[Policy] = [policy_of(source.tables, each, "tried") for each in choices]
        found = validate_policies(policies, loaded, samples, lambda sample: prompts[sample.id])
        return [each.losses for each in found]

    return run
