"""Reading a trace: samples, and one layer at a time, each shard checked when first read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvtune.common.errors import KvtuneError, nearest
from kvtune.common.files import inside, sha256
from kvtune.common.stored import parse_json, read_bytes, read_json
from kvtune.traces.geometry import Geometry, Rope, geometry_from_dict
from kvtune.traces.manifest import (
    AGAIN,
    ENTRY,
    MANIFEST,
    EntryPlace,
    Manifest,
    Shard,
    read_entry,
    read_manifest,
)
from kvtune.traces.samples import Sample

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_CONTINUE = "run the same capture again; it continues where it stopped."


@dataclass(frozen=True)
class SampleRecord(Sample):
    """A captured sample and what the full-cache model made of it.

    Args:
        target_logprob: log-probability of every row's target, in nats [C].
        predicted: the most probable token of every row [C].
        folder: the sample's folder inside the trace.
        shards: file name -> sha256, bytes and tensors.
    """

    target_logprob: tuple[float, ...] = ()
    predicted: tuple[int, ...] = ()
    folder: str = ""
    shards: Mapping[str, Shard] = field(default_factory=dict, repr=False, hash=False)

    @property
    def answer_accuracy(self) -> float:
        """Share of answer digits that the full-cache model predicts, given those before; or nan."""
        rows = [t for t, asked in enumerate(self.answer_mask) if asked]
        hits = sum(self.predicted[t] == self.targets[t] for t in rows)
        return hits / len(rows) if rows else float("nan")


@dataclass(frozen=True)
class LayerTrace:
    """One layer of one sample. Tensors that were not asked for are not held.

    Args:
        sample_id: whose.
        layer: which.
        prompt_tokens: P.
        observed: C.
        scale: factor of the scores before the softmax.
        window: sliding window in tokens, or None.
        tensors: by name, as captured.
        rope: its rotary positions, or None.
    """

    sample_id: str
    layer: int
    prompt_tokens: int
    observed: int
    scale: float
    window: int | None
    tensors: Mapping[str, Tensor] = field(repr=False)
    rope: Rope | None = None

    def __getitem__(self, name: str) -> Tensor:
        """A tensor by name.

        Raises:
            KvtuneError: it was not recorded or not asked for.
        """
        if name not in self.tensors:
            raise KvtuneError(
                f"layer {self.layer} of sample {self.sample_id} has no {name!r} loaded",
                hint="name it when loading, and capture with the signals that are needed.",
            )
        return self.tensors[name]

    @property
    def q(self) -> Tensor:
        """Post-RoPE queries of the last ``queries`` positions [Hq, Q, D], C <= Q <= N."""
        return self["q"]

    @property
    def k(self) -> Tensor:
        """Post-RoPE keys [H, N, D]."""
        return self["k"]

    @property
    def v(self) -> Tensor:
        """Values [H, N, D]."""
        return self["v"]

    @property
    def output(self) -> Tensor:
        """Full-cache attention output at the observed positions [Hq, C, D]."""
        return self["output"]

    @property
    def probes(self) -> Tensor:
        """Gradients of random directions of the logits at the attention output [S, C, Hq, D]."""
        return self["probes"]

    @property
    def column_sums(self) -> Tensor:
        """Attention that every prompt key got from all prompt queries [Hq, P]."""
        return self["column_sums"]


@dataclass(frozen=True, eq=False)
class Trace:
    """A captured trace, read only.

    Args:
        root: its folder.
        manifest: the manifest as written.
        samples: all samples, in order.
    """

    root: Path
    manifest: Mapping[str, Any] = field(repr=False)
    samples: tuple[SampleRecord, ...] = field(repr=False)
    _checked: set[str] = field(default_factory=set, repr=False)

    @cached_property
    def geometry(self) -> Geometry:
        """The captured model's geometry."""
        return geometry_from_dict(self.manifest["model"]["geometry"])

    @property
    def fingerprint(self) -> str:
        """The captured model's fingerprint."""
        return str(self.manifest["model"]["fingerprint"])

    @property
    def probes(self) -> int:
        """How many probes each sample was captured with, S."""
        return int(self.manifest["probes"])

    @property
    def content_sha256(self) -> str:
        """Hash of all that the trace holds: manifest and, through it, every shard."""
        return hashlib.sha256(json.dumps(self.manifest, sort_keys=True).encode()).hexdigest()

    @property
    def checked(self) -> frozenset[str]:
        """Files whose content this process has hashed, for another one that need not."""
        return frozenset(self._checked)

    def files(self) -> list[Path]:
        """All shards."""
        return [
            inside(self.root, f"{sample.folder}/{name}")
            for sample in self.samples
            for name in sample.shards
        ]

    def of_split(self, split: str) -> tuple[SampleRecord, ...]:
        """The samples of one split."""
        return tuple(s for s in self.samples if s.split == split)

    def sample(self, sample_id: str) -> SampleRecord:
        """A sample by id."""
        for sample in self.samples:
            if sample.id == sample_id:
                return sample
        hint = nearest(sample_id, (s.id for s in self.samples))
        raise KvtuneError(f"no sample {sample_id!r}", where=str(self.root), hint=hint)

    def require_model(self, fingerprint: str) -> None:
        """Refuse to go on with another model than the captured one."""
        if fingerprint != self.fingerprint:
            raise KvtuneError(
                f"the trace is of another model ({self.manifest['model']['name']}, fingerprint "
                f"{self.fingerprint[:12]}, not {fingerprint[:12]})",
                where=str(self.root),
                hint="capture a trace of this model, or give the model that was captured.",
            )

    def layer(
        self,
        sample_id: str,
        layer: int,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
        names: Iterable[str] | None = None,
    ) -> LayerTrace:
        """Load one layer of one sample.

        Args:
            sample_id: whose.
            layer: which.
            device: where the tensors go.
            dtype: what they are cast to; None means float32.
            names: which tensors; None means all.

        Raises:
            KvtuneError: unknown sample, layer or name; missing, truncated or altered shard.
        """
        import torch

        record = self.sample(sample_id)
        geometry = self.geometry
        if not 0 <= layer < geometry.layers:
            hint = f"the model has layers 0 to {geometry.layers - 1}."
            raise KvtuneError(f"no layer {layer}", where=str(self.root), hint=hint)
        path = self._shard(record, layer)
        loaded = _read_tensors(path, names)
        to = torch.float32 if dtype is None else dtype
        return LayerTrace(
            sample_id=sample_id,
            layer=layer,
            prompt_tokens=record.prompt,
            observed=record.observed,
            scale=geometry.scale,
            window=geometry.windows[layer],
            rope=geometry.rope_at(layer),
            tensors={
                name: t.to(device).to(to) for name, t in loaded.items()
            },  # cast there: less moves
        )

    def _shard(self, record: SampleRecord, layer: int) -> Path:
        """The shard's path, its content checked when it is first asked for."""
        name = f"layer-{layer:02d}.safetensors"
        path = inside(self.root, f"{record.folder}/{name}")
        if str(path) not in self._checked:
            stored = record.shards.get(name)
            if stored is None or _sha256(path) != stored.sha256:
                raise KvtuneError("does not match its sha256", where=str(path), hint=AGAIN)
            self._checked.add(str(path))
        return path


def open_trace(root: Path, hashed: Iterable[Path] = ()) -> Trace:
    """Open a captured trace.

    Args:
        root: its folder.
        hashed: shards whose content this process has just hashed, and need not again.

    Raises:
        KvtuneError: no trace, an unfinished one, a newer format, or a damaged manifest.
    """
    path = Path(root) / MANIFEST
    if not path.is_file():
        raise KvtuneError(f"holds no trace ({MANIFEST} is missing)", where=str(root))
    plain = read_json(path, AGAIN)
    manifest = read_manifest(plain, str(path))
    finished, planned = len(manifest.samples), manifest.workload.samples
    if finished < planned:
        raise KvtuneError(
            f"the capture was interrupted ({finished} of {planned} samples)",
            where=str(root),
            hint=_CONTINUE,
        )
    samples = tuple(_record(Path(root), place, manifest) for place in manifest.samples)
    return Trace(Path(root), plain, samples, {str(path.resolve()) for path in hashed})


def _record(root: Path, place: EntryPlace, manifest: Manifest) -> SampleRecord:
    path = inside(root, f"{place.folder}/{ENTRY}")
    data = read_bytes(path, AGAIN)
    if hashlib.sha256(data).hexdigest() != place.sha256:
        raise KvtuneError("does not match its sha256", where=str(path), hint=AGAIN)
    entry = read_entry(parse_json(data, str(path), AGAIN), manifest, str(path))
    return SampleRecord(
        **vars(entry.sample),
        target_logprob=entry.target_logprob,
        predicted=entry.predicted,
        folder=place.folder,
        shards=entry.shards,
    )


def _sha256(path: Path) -> str:
    try:
        return sha256(path)
    except OSError as error:
        raise KvtuneError(
            f"cannot be read: {error.strerror}", where=str(path), hint=AGAIN
        ) from error


def _read_tensors(path: Path, names: Iterable[str] | None) -> dict[str, Tensor]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as shard:
            known = set(shard.keys())
            wanted = sorted(known) if names is None else list(names)
            for name in wanted:
                if name not in known:
                    raise KvtuneError(
                        f"holds no tensor {name!r}",
                        where=str(path),
                        hint="capture again with the signal; it holds " + ", ".join(sorted(known)),
                    )
            return {name: shard.get_tensor(name) for name in wanted}
    except (OSError, SafetensorError) as error:
        raise KvtuneError(f"cannot be read: {error}", where=str(path), hint=AGAIN) from error
