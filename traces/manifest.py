"""The two JSON files of a trace: the manifest, and each sample's entry; their schemas."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from kvtune.common.bounds import Count, Digest, Finite, Name, Whole
from kvtune.common.errors import KvtuneError
from kvtune.common.stored import checked
from kvtune.traces.geometry import Geometry, fitting
from kvtune.traces.samples import Sample

FORMAT = 1
MANIFEST = "manifest.json"
ENTRY = "sample.json"
AGAIN = "the file is damaged; remove the trace's folder and capture again."


@dataclass(frozen=True)
class CapturedModel:
    """The model that was captured: name, fingerprint and attention geometry."""

    name: Name
    fingerprint: Digest
    geometry: Geometry


@dataclass(frozen=True)
class CapturedDtype:
    """The dtype that the model ran in, and why."""

    model: Name
    reason: Name


@dataclass(frozen=True)
class CapturedWorkload:
    """What was to be captured: words, number of samples, hash of their content."""

    description: Name
    samples: Count
    content_sha256: Digest


@dataclass(frozen=True)
class EntryPlace:
    """A finished sample: its id, its folder inside the trace and the hash of its entry."""

    id: Name
    folder: Name
    sha256: Digest


@dataclass(frozen=True)
class Manifest:
    """``manifest.json``: the capture's settings, and the samples that are finished."""

    format: Literal[1]
    model: CapturedModel
    dtype: CapturedDtype
    probes: Count
    seed: Whole
    queries: Literal["all", "observed"] | Whole
    signals: tuple[Name, ...]
    workload: CapturedWorkload
    versions: dict[str, Name]
    samples: tuple[EntryPlace, ...]


@dataclass(frozen=True)
class StoredTensor:
    """Shape and dtype of one tensor of a shard."""

    shape: tuple[Whole, ...]
    dtype: Name


@dataclass(frozen=True)
class Shard:
    """One layer's file: hash, size, and what it holds."""

    sha256: Digest
    bytes: Whole
    tensors: dict[str, StoredTensor]


@dataclass(frozen=True)
class Entry:
    """``sample.json``: a sample, what the full model made of it, and its shards by file name."""

    sample: Sample
    target_logprob: tuple[Finite, ...]
    predicted: tuple[Whole, ...]
    shards: dict[str, Shard]


def read_manifest(value: Any, where: str) -> Manifest:
    """A manifest from its parsed JSON.

    Raises:
        KvtuneError: another format, or something in it is missing or wrong.
    """
    found = value.get("format") if isinstance(value, dict) else None
    if isinstance(found, int) and found != FORMAT:
        raise KvtuneError(
            f"trace format {found}; this kvtune reads {FORMAT}",
            where=where,
            hint="capture again with this kvtune.",
        )
    manifest = checked(Manifest, value, where, AGAIN)
    fitting(manifest.model.geometry, where, AGAIN)
    return manifest


def read_entry(value: Any, manifest: Manifest, where: str) -> Entry:
    """A sample's entry from its parsed JSON.

    Raises:
        KvtuneError: something in it is missing, wrong, or does not fit the rest.
    """
    entry = checked(Entry, value, where, AGAIN)
    rows, words = entry.sample.observed, manifest.model.geometry.vocab_size
    if not len(entry.target_logprob) == len(entry.predicted) == rows:
        raise KvtuneError(
            "target_logprob and predicted must have one entry a row", where=where, hint=AGAIN
        )
    if max(*entry.sample.token_ids, entry.sample.next_token, *entry.predicted) >= words:
        raise KvtuneError("a token is outside the vocabulary", where=where, hint=AGAIN)
    return entry
