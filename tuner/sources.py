"""Where quality comes from: the model's own trace, or packaged tables that stand in for it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kvtune.common.errors import KvtuneError
from kvtune.common.estimate import Estimate, Tier
from kvtune.common.files import cache_dir
from kvtune.common.kept import NOTHING_KEPT, Kept
from kvtune.common.progress import Progress
from kvtune.policies.export.stored_alike import usual_ratio
from kvtune.policies.signals import Needs
from kvtune.profiles.shape import ModelShape
from kvtune.simulator.quality.calibration import Calibration
from kvtune.simulator.quality.rules import Rule
from kvtune.simulator.quality.tables import Floats, Tables
from kvtune.simulator.quality.tables_file import load_tables, save_tables
from kvtune.traces.signals import SIGNALS
from kvtune.tuner import source_models
from kvtune.tuner.band import band, band_by_kind, band_of_live
from kvtune.tuner.options import FEW, FULL, LAPTOP, READERS, ROTATED, WEIGHTED, Menu, every_method
from kvtune.tuner.quality import calibrated, calibrated_by_kind, mean_over_kinds
from kvtune.tuner.request import SearchRequest
from kvtune.tuner.screening import MOST, screened
from kvtune.tuner.solver import evicts
from kvtune.tuner.within import limits_of, menu_within, stores_alike

if TYPE_CHECKING:
    from kvtune.traces.models import LoadedModel
    from kvtune.traces.trace import Trace
    from kvtune.tuner.beside import Beside

MEASURED = "measured"
"""Folder of finished replays and live runs in a run directory."""

_PROBES = {"small": 4, "mixed": 4, "full": 16}
_LEAST_WINDOW = 64  # prompt queries of every trace: policies that come later may look at them


@dataclass(frozen=True)
class QualitySource:
    """Tables to search on, and what is needed to check the answer.

    Args:
        tables: every split.
        calibration: from predicted to live.
        stand_in: names of the models that stand in, or "" where the tables are the model's own.
        loaded: the model, where its weights are at hand.
        trace: its trace, likewise.
        curves: a stand-in's baselines, live: family -> measured points.
        provenance: versions, seeds and hashes.
        kept: replays and live runs of this trace and model that a search has done.
        beside: processes that replay and run live for this one, where a search has some.
    """

    tables: Tables
    calibration: Calibration
    stand_in: str = ""
    loaded: LoadedModel | None = None
    trace: Trace | None = None
    curves: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)
    kept: Kept = NOTHING_KEPT
    beside: Beside | None = field(default=None, repr=False, compare=False)

    def loss(
        self, by_sample: ArrayLike, kinds: Sequence[str], tier: Tier, *, evicts: bool
    ) -> Estimate:
        """A policy's loss from what it loses on samples: calibrated, and a stand-in's as a band."""
        if self.stand_in:
            return band(by_sample, kinds, self.calibration, evicts=evicts)
        return calibrated(self.calibration, by_sample, kinds, tier, evicts=evicts)

    def loss_of(self, choice: NDArray[np.int64], split: str = "evaluate") -> Estimate:
        """A configuration's loss, ``[I]``, on the samples of a split."""
        rule = self.tables.rule_of(choice)
        if rule is not None and rule.live is not None:
            return rule.live
        losses, kinds = self.predicted(choice, split)
        tier: Tier = "table" if rule is None else "replay"
        return self.loss(losses, kinds, tier, evicts=self.evicts(choice))

    def losses_by_kind(
        self, by_sample: ArrayLike, kinds: Sequence[str], tier: Tier, *, evicts: bool
    ) -> dict[str, Estimate]:
        """A policy's loss on each kind of text, by the same means as ``loss`` on all of them."""
        if self.stand_in:
            return band_by_kind(by_sample, kinds, self.calibration, evicts=evicts)
        return calibrated_by_kind(self.calibration, by_sample, kinds, tier, evicts=evicts)

    def losses_by_kind_of(self, choice: NDArray[np.int64]) -> dict[str, Estimate]:
        """A configuration's loss, ``[I]``, on each kind of held-out text."""
        rule = self.tables.rule_of(choice)
        if rule is not None and rule.live is not None:
            means = self.by_kind(choice)
            return {kind: band_of_live(kl, (), {}, rule.family) for kind, kl in means.items()}
        losses, kinds = self.predicted(choice, "evaluate")
        tier: Tier = "table" if rule is None else "replay"
        return self.losses_by_kind(losses, kinds, tier, evicts=self.evicts(choice))

    def value_of(self, choice: NDArray[np.int64], split: str) -> float:
        """The calibrated loss of a choice, without its interval, nats/token."""
        return mean_over_kinds(*self.expected(choice, split))

    def by_kind(self, choice: NDArray[np.int64], split: str = "evaluate") -> dict[str, float]:
        """The calibrated loss of a choice by kind of text, nats/token."""
        losses, kinds = self.expected(choice, split)
        labels = np.asarray(kinds)
        return {kind: float(losses[labels == kind].mean()) for kind in sorted(set(kinds))}

    def expected(
        self, choice: NDArray[np.int64], split: str
    ) -> tuple[NDArray[np.float64], list[str]]:
        """The calibrated losses of a configuration on the samples of a split, and their kinds."""
        losses, kinds = self.predicted(choice, split)
        rule = self.tables.rule_of(choice)
        if rule is not None and rule.live is not None:
            return np.asarray(losses, float), kinds
        return self.calibration.applied(losses, kinds, self.evicts(choice)), kinds

    def predicted(self, choice: NDArray[np.int64], split: str) -> tuple[Floats, list[str]]:
        """What the tables say of a configuration on the samples of a split, and their kinds."""
        tables = self.tables.of_split(split)
        return tables.by_sample(choice), [sample.kind for sample in tables.samples]

    @property
    def of_own_runtime(self) -> QualitySource:
        """The same for kvtune's own runtime, where live runs were those of a stack."""
        if not self.calibration.levels_all:
            return self
        return replace(self, calibration=source_models.packaged_calibration())

    def with_rules(self, rules: Sequence[Rule]) -> QualitySource:
        """The same with rules behind the options of its tables."""
        return replace(self, tables=replace(self.tables, rules=tuple(rules)))

    def evicts(self, choice: NDArray[np.int64]) -> bool:
        """Whether any head of a configuration keeps less than everything."""
        return any(map(evicts, self.tables.given(choice)))


def stand_in(shape: ModelShape) -> QualitySource:
    """What stands in for a model of this shape."""
    return stand_in_for(shape.layers, shape.kv_heads, shape.head_dim, shape.name)


def stand_in_for(layers: int, kv_heads: int, head_dim: int, model: str) -> QualitySource:
    """All sources' tables, as far as they say anything of a model with other heads.

    The calibration is the packaged source's, for all of them: how far live runs leave predictions
    hardly differs by model.
    """
    provenance = source_models.packaged_tables()[1]
    tables, names = source_models.all_tables(layers, kv_heads, head_dim, model)
    return QualitySource(
        tables=tables,
        calibration=source_models.packaged_calibration(),
        stand_in=names,
        curves=provenance["baselines"],
        provenance={
            "stand_in": {k: v for k, v in provenance.items() if k != "baselines"},
            "sources": source_models.digests(),
        },
    )


def own_trace(
    request: SearchRequest, progress: Progress, beside: Beside | None = None
) -> QualitySource:
    """Load the model, capture its trace, build its tables; what is finished is used again.

    Raises:
        KvtuneError: the weights cannot be had, or do not fit the shape.
    """
    from kvtune.traces.calibration import find_calibration
    from kvtune.traces.models import best_device, load_model

    loaded = load_model(request.model, device=request.device or best_device(), progress=progress)
    progress.note(f"running in {loaded.dtype_reason}")
    _check_shape(loaded, request.shape)
    beside = beside and beside.used_on(loaded.device)
    calibrated = find_calibration(loaded.fingerprint) is not None
    menu = menu_of(request, calibrated=calibrated, pairs=loaded.geometry.layers % 2 == 0)
    trace, key, provenance = _own_trace(request, loaded, menu, progress, beside)
    if len(menu.methods) > MOST:
        kept = cache_dir() / "tables" / f"{request.shape.name}-{key}"
        menu = screened(menu, trace, kept, loaded.device, progress)
    tables = _own_tables(request, trace, menu, key, loaded.device, progress, beside)
    return QualitySource(
        tables,
        _calibration_for(request.stack),
        loaded=loaded,
        trace=trace,
        provenance=provenance,
        kept=Kept(request.run_dir / MEASURED, _follow_from(loaded, trace)),
        beside=beside,
    )


def _calibration_for(stack: str | None) -> Calibration:
    """The packaged one; for a stack that also stores answers, at the level usual of its formats."""
    packaged, limits = source_models.packaged_calibration(), limits_of(stack)
    if limits is None or not stores_alike(stack):
        return packaged
    return replace(packaged, level=float(np.log(usual_ratio(limits))), levels_all=True)


def _follow_from(loaded: LoadedModel, trace: Trace) -> tuple[object, ...]:
    """What all replays and live runs of a trace's samples follow from, beside policy and sample."""
    from kvtune.traces.calibration import find_calibration
    from kvtune.traces.learned import digest_of_learned

    return (
        trace.content_sha256,
        loaded.fingerprint,
        loaded.dtype,
        loaded.device,
        find_calibration(loaded.fingerprint),
        digest_of_learned(loaded.fingerprint),
        version("torch"),
        version("transformers"),
    )


def _own_trace(
    request: SearchRequest,
    loaded: LoadedModel,
    menu: Menu,
    progress: Progress,
    beside: Beside | None,
) -> tuple[Trace, str, dict[str, Any]]:
    """The trace that a menu needs, the key it is kept under, and where it comes from."""
    from kvtune.traces.samples import content_hash
    from kvtune.traces.shards import CaptureJob
    from kvtune.traces.workloads import build, named_workload
    from kvtune.tuner.engines import captured

    workload = named_workload(request.workload, request.seed, request.texts)
    samples, probes = build(workload, loaded.tokenizer), _PROBES[request.workload]
    signals, queries = signals_of(menu.needs), queries_of(menu.needs, workload.observed)
    content = content_hash(samples)
    key = _key(loaded.fingerprint, content, probes, request.seed, loaded.dtype, signals, queries)
    job = CaptureJob(
        model=request.model,
        dtype=loaded.dtype,
        samples=tuple(samples),
        folder=cache_dir() / "traces" / f"{request.shape.name}-{key}",
        probes=probes,
        seed=request.seed,
        workload=workload.describe(),
        queries=queries,
        signals=signals,
    )
    trace = captured(job, loaded, request.engine, progress, beside)
    return (
        trace,
        key,
        {
            "trace": trace.content_sha256,
            "workload": workload.describe(),
            "probes": probes,
            "dtype": loaded.dtype,
            "device": loaded.device,
        },
    )


def menu_of(request: SearchRequest, *, calibrated: bool, pairs: bool = False) -> Menu:
    """What a head may be given: shares and formats by workload, methods as the request asks.

    The menu of all methods has rotated formats and weighted keys too; that of a few more has the
    options of ``FEW``; a limit on what is read, or brought over from the host, brings readers. Of
    all these, what the stack can express stays. ``"auto"`` is settled before (``with_menu``).
    Links between layers are on it where these come in ``pairs``.
    """
    menu = FULL if request.workload == "full" else LAPTOP
    reads_less = request.reads_less
    if request.menu == "all":
        methods = every_method(calibrated=calibrated, reads_less=reads_less, pairs=pairs)
        formats = (*menu.formats, *ROTATED)
        menu = replace(menu, methods=methods, formats=formats, weighted=WEIGHTED)
    elif reads_less:
        menu = replace(menu, methods=menu.methods + READERS)
    if request.menu == "few":
        menu = replace(menu, more=FEW.more)
    return menu_within(menu, limits_of(request.stack))


def signals_of(needs: Needs) -> tuple[str, ...]:
    """What capture has to record for methods with these needs, and for the baselines."""
    wanted = needs | Needs(column_sums=True)
    return tuple(name for name in SIGNALS if getattr(wanted, name))


def queries_of(needs: Needs, observed: int) -> int:
    """How many of a sample's last queries to store: the observed, and the widest window."""
    return observed + max(needs.window, _LEAST_WINDOW)


def _own_tables(
    request: SearchRequest,
    trace: Trace,
    menu: Menu,
    key: str,
    device: str,
    progress: Progress,
    beside: Beside | None,
) -> Tables:
    from kvtune.tuner.engines import built

    model = request.shape.name
    options = menu.options()
    digest = hashlib.sha256(repr(options).encode()).hexdigest()[:12]
    path = cache_dir() / "tables" / f"{model}-{key}-{digest}.safetensors"
    if not path.exists():
        parts = Kept(path.with_suffix(".parts"), (trace.content_sha256, digest, device))
        tables = built(trace, options, device, request.engine, progress, parts, beside)
        save_tables(tables, path, {"trace": trace.content_sha256})
        parts.clear()
        return load_tables(path)[0]  # rounded as the file is: a second search reads the same
    tables, provenance = load_tables(path)
    if provenance.get("trace") != trace.content_sha256:
        raise KvtuneError("these tables are of another trace", where=str(path), hint="remove it.")
    progress.note("the trace and its tables are used again")
    return tables


def _check_shape(loaded: LoadedModel, shape: ModelShape) -> None:
    ours = (loaded.geometry.layers, loaded.geometry.kv_heads, loaded.geometry.head_dim)
    if ours != (shape.layers, shape.kv_heads, shape.head_dim):
        raise KvtuneError(
            f"{loaded.name} has (layers, KV heads, head_dim) {ours}, not {shape.name}'s",
            hint="name the model by the path of its weights alone.",
        )


def _key(*parts: object) -> str:
    return hashlib.sha256(json.dumps([str(part) for part in parts]).encode()).hexdigest()[:12]
