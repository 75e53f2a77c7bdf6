"""Writing a trace: shards first, then a sample's entry, so that an interruption loses one sample.

A sample counts once it stands in ``manifest.json``; what a killed run left without an entry is
written again.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import kvtune
from kvtune.common.errors import KvtuneError
from kvtune.common.files import atomic, sha256, write_json
from kvtune.common.stored import read_json
from kvtune.traces.manifest import ENTRY, FORMAT, MANIFEST, read_manifest
from kvtune.traces.samples import Sample, content_hash
from kvtune.traces.signals import SIGNALS, check_signals, tensors_of

if TYPE_CHECKING:
    from torch import Tensor

    from kvtune.traces.models import LoadedModel

_STATISTICS = tensors_of(SIGNALS)
_FP16_MOST = 65504.0
_FP16_LEAST_PEAK = 2.0**-8


@dataclass(frozen=True)
class CaptureSettings:
    """All that decides what a trace holds; two captures with equal settings are one capture.

    Args:
        header: the manifest's fields but for the samples' entries.
        sample_ids: ids of all samples, in order.
        probes: S.
        seed: of the probes' labels.
        queries: ``all``, ``observed`` or the number of last queries stored.
        signals: names from ``signals.SIGNALS``.
    """

    header: dict[str, Any]
    sample_ids: tuple[str, ...]
    probes: int
    seed: int
    queries: str | int
    signals: tuple[str, ...]

    @staticmethod
    def of(
        loaded: LoadedModel,
        samples: Sequence[Sample],
        probes: int,
        seed: int,
        description: str,
        queries: str | int,
        signals: tuple[str, ...],
    ) -> CaptureSettings:
        """Settings of a capture, checked.

        Raises:
            KvtuneError: no samples, repeated ids, no probes, unknown signal or queries.
        """
        ids = tuple(sample.id for sample in samples)
        _check(loaded, samples, ids, probes, queries)
        check_signals(signals)
        header = {
            "format": FORMAT,
            "model": {
                "name": loaded.name,
                "fingerprint": loaded.fingerprint,
                "geometry": loaded.geometry.as_dict(),
            },
            "dtype": {"model": loaded.dtype, "reason": loaded.dtype_reason},
            "probes": probes,
            "seed": seed,
            "queries": queries,
            "signals": list(signals),
            "workload": {
                "description": description,
                "samples": len(samples),
                "content_sha256": content_hash(samples),
            },
            "versions": _versions(),
        }
        return CaptureSettings(header, ids, probes, seed, queries, signals)

    def stored_queries(self, sample: Sample) -> int:
        """How many of a sample's last queries are stored: at least the observed ones."""
        most, least = len(sample.token_ids), sample.observed
        if isinstance(self.queries, int):
            return min(most, max(least, self.queries))
        return most if self.queries == "all" else least


def _check(
    loaded: LoadedModel,
    samples: Sequence[Sample],
    ids: tuple[str, ...],
    probes: int,
    queries: str | int,
) -> None:
    if not samples:
        raise KvtuneError("there is no sample to capture", hint="ask for at least one sample.")
    if len(set(ids)) != len(ids):
        raise KvtuneError("two samples have the same id")
    if probes < 1:
        raise KvtuneError(f"{probes} probes", hint="at least one; 4 on a CPU, 16 on a GPU.")
    if isinstance(queries, str) and queries not in ("all", "observed"):
        raise KvtuneError(f"queries={queries!r}", hint="use all, observed or a number.")
    longest = max(len(sample.token_ids) for sample in samples)
    if longest > loaded.geometry.max_context:
        raise KvtuneError(
            f"samples of {longest} tokens, but {loaded.name} was made for at most "
            f"{loaded.geometry.max_context}",
            hint="capture shorter samples.",
        )


def _versions() -> dict[str, str]:
    names = ("torch", "transformers", "safetensors")
    return {"kvtune": kvtune.__version__} | {n: importlib.metadata.version(n) for n in names}


class TraceWriter:
    """Writes one trace folder. Life cycle: open, ``sample`` for each unfinished one, ``close``."""

    def __init__(self, root: Path, settings: CaptureSettings) -> None:
        """Open or continue a trace.

        Raises:
            KvtuneError: the folder holds a trace with other settings, or cannot be written.
        """
        self.root = root
        self.settings = settings
        self.entries: dict[str, dict[str, Any]] = {}
        self.hashed: set[Path] = set()  # shards whose content was hashed as it was written
        if (root / MANIFEST).is_file():
            self._continue()
        else:
            self._write_manifest()

    def finished(self, sample: Sample) -> bool:
        """Whether the sample is in the manifest and its files are there."""
        entry = self.entries.get(sample.id)
        return entry is not None and (self.root / entry["folder"] / ENTRY).is_file()

    @contextmanager
    def sample(self, index: int, sample: Sample) -> Iterator[SampleWriter]:
        """A writer for one sample; its entry is made only if the block ends well."""
        name = f"sample-{index:04d}"
        shutil.rmtree(self.root / name, ignore_errors=True)
        folder = SampleWriter(self.root / name, sample)
        yield folder
        digest = sha256(self.root / name / ENTRY)
        self.entries[sample.id] = {"id": sample.id, "folder": name, "sha256": digest}
        self.hashed |= {self.root / name / shard for shard in folder.shards}
        self._write_manifest()

    def close(self) -> None:
        """Write the manifest for good. Safe to call again."""
        self._write_manifest()

    def _continue(self) -> None:
        path = self.root / MANIFEST
        found = read_json(path, "remove the folder or choose another one.")
        read_manifest(found, str(path))
        entries = {entry["id"]: entry for entry in found.pop("samples")}
        differences = _differences(found, self.settings.header)
        if differences:
            raise KvtuneError(
                "the folder holds another trace (different " + ", ".join(differences) + ")",
                where=str(self.root),
                hint="choose another folder, or remove this one.",
            )
        self.entries = {id_: entries[id_] for id_ in self.settings.sample_ids if id_ in entries}

    def _write_manifest(self) -> None:
        ids = self.settings.sample_ids
        done = [self.entries[id_] for id_ in ids if id_ in self.entries]
        write_json(self.root / MANIFEST, {**self.settings.header, "samples": done})


def _differences(found: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """Fields that make two traces different ones; versions and wording do not."""
    paths = {
        "format": ("format",),
        "model": ("model", "fingerprint"),
        "dtype": ("dtype", "model"),
        "probes": ("probes",),
        "seed": ("seed",),
        "queries": ("queries",),
        "signals": ("signals",),
        "workload": ("workload", "content_sha256"),
    }
    return [name for name, path in paths.items() if _at(found, path) != _at(wanted, path)]


def _at(header: dict[str, Any], path: tuple[str, ...]) -> Any:
    value: Any = header
    for key in path:
        value = value[key]
    return value


@dataclass
class SampleWriter:
    """Writes one sample's folder: a shard a layer, then the entry with their hashes."""

    folder: Path
    sample: Sample
    shards: dict[str, dict[str, Any]] = field(default_factory=dict)

    def write_layer(self, layer: int, tensors: dict[str, Tensor]) -> None:
        """Write one layer's shard; tensors are stored in the dtype that ``compact`` chooses."""
        from safetensors.torch import save

        kept = {name: compact(name, tensor) for name, tensor in tensors.items()}
        data: bytes = save(kept)  # type: ignore[no-untyped-call,unused-ignore]
        name = f"layer-{layer:02d}.safetensors"
        with atomic(self.folder / name) as temporary:
            temporary.write_bytes(data)
        described = {
            n: {"shape": list(t.shape), "dtype": str(t.dtype).removeprefix("torch.")}
            for n, t in kept.items()
        }
        digest = hashlib.sha256(data).hexdigest()
        self.shards[name] = {"sha256": digest, "bytes": len(data), "tensors": described}

    def finish(self, target_logprob: list[float], predicted: list[int]) -> None:
        """Write the entry: the sample, the full model's output on it, the shards' hashes."""
        entry = {
            "sample": asdict(self.sample),
            "target_logprob": target_logprob,
            "predicted": predicted,
            "shards": dict(sorted(self.shards.items())),  # layers may be written in any order
        }
        write_json(self.folder / ENTRY, entry)


def compact(name: str, tensor: Tensor) -> Tensor:
    """The tensor on the CPU, contiguous, in its stored dtype.

    A bf16 or fp16 model's tensors stay as they are. Those of an fp32 model are stored in fp16,
    whose rounding (2^-11) is far below what any policy does to them, unless their largest value
    leaves fp16's range above or comes near its smallest steps below. Statistics stay fp32.
    """
    import torch

    kept = tensor.detach()
    if kept.dtype == torch.float32 and name not in _STATISTICS:
        peak = float(kept.abs().max()) if kept.numel() else 0.0
        if peak == 0.0 or _FP16_LEAST_PEAK <= peak <= _FP16_MOST:
            kept = kept.half()
    return kept.cpu().contiguous()
