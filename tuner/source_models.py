"""Models whose tables stand in for others: the packaged one, and those that were added as files.

A source's file holds what each option loses when all heads have it, sample by sample: nothing of
single heads, since that carries over to no other model. It is named by its hash, which is checked
whenever it is read.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

from kvtune.common.errors import KvtuneError
from kvtune.common.files import atomic, cache_dir, sha256
from kvtune.common.progress import Progress
from kvtune.common.stored import parse_json, require_file
from kvtune.simulator.quality.calibration import Calibration, read_calibration
from kvtune.simulator.quality.tables import Tables, head_exchangeable, join
from kvtune.simulator.quality.tables_file import load_tables, save_tables
from kvtune.traces.trace import Trace

STAND_IN = "smollm2-135m"
CALIBRATION = "calibration.json"
SPLITS = frozenset(("select", "evaluate"))


def packaged_tables() -> tuple[Tables, dict[str, Any]]:
    """The tables of SmolLM2-135M that the package ships, measured on a GPU."""
    with resources.as_file(_data() / f"{STAND_IN}.safetensors") as file:
        _check_hash(file, _packaged_digest(), "install kvtune again.")
        tables, about = load_tables(file)
        return replace(tables, model=STAND_IN), about


def packaged_calibration() -> Calibration:
    """From predicted to live, as it was measured on the packaged source."""
    file = _data() / CALIBRATION
    return read_calibration(parse_json(file.read_bytes(), str(file)), str(file))


def digests() -> list[str]:
    """Hashes of all sources' files, the packaged one's first: what a stand-in's answer rests on."""
    return [_packaged_digest(), *(path.stem for path in _added())]


def all_tables(layers: int, kv_heads: int, head_dim: int, model: str) -> tuple[Tables, str]:
    """Every source's losses for a model of this shape, side by side, and the sources' names."""
    found = [packaged_tables()[0], *(tables for tables, _ in added())]
    parts = [_judging(head_exchangeable(each, model, layers, kv_heads, head_dim)) for each in found]
    if len(parts) > 1:
        parts = [_kinds_of(part, source.model) for part, source in zip(parts, found, strict=True)]
    return join(parts), ", ".join(source.model for source in found)


def _judging(tables: Tables) -> Tables:
    """Search samples among the selection samples: nothing is fitted on them that they flatter."""
    samples = (
        replace(s, split="select" if s.split == "search" else s.split) for s in tables.samples
    )
    return replace(tables, samples=tuple(samples))


def _kinds_of(tables: Tables, model: str) -> Tables:
    """Kinds of text that name their source, so that every source counts alike."""
    named = (replace(sample, kind=f"{sample.kind}, {model}") for sample in tables.samples)
    return replace(tables, samples=tuple(named))


def added() -> list[tuple[Tables, Path]]:
    """The sources that were added, and their files.

    Raises:
        KvtuneError: a file is damaged.
    """
    found = []
    for path in _added():
        _check_hash(path, path.stem, "remove the file, and add the source again.")
        found.append((load_tables(path)[0], path))
    return found


def pack(trace: Trace, name: str, out: Path, device: str, progress: Progress) -> str:
    """Write a source's file from a model's trace; its hash.

    Raises:
        KvtuneError: the trace lacks a split, or the file cannot be written.
    """
    from kvtune.simulator.quality.build import build_tables

    options = packaged_tables()[0].options
    tables = build_tables(trace, options, device=device, progress=progress)
    small = head_exchangeable(tables, name, 1, 1, tables.head_dim)
    _check_usable(small, str(trace.root))
    facts = {"trace": trace.content_sha256, "model_fingerprint": trace.fingerprint}
    save_tables(small, out, {"made_by": "kvtune tables pack", **facts, "probes": trace.probes})
    return sha256(out)


def add(file: Path, expected: str | None = None) -> tuple[Tables, Path]:
    """Check a source's file and keep it; the same file twice is kept once.

    Args:
        file: that ``pack`` wrote, here or elsewhere.
        expected: sha256 that its contributor names; None where it is trusted as it is.

    Raises:
        KvtuneError: it is not that file, cannot be read, or does not fit the packaged tables.
    """
    require_file(file)
    digest = sha256(file)
    if expected is not None:
        _check_hash(file, expected.lower(), "fetch it again, or ask its contributor.")
    tables = load_tables(file)[0]
    _check_usable(tables, str(file))
    kept = _folder() / f"{digest}.safetensors"
    others = {each.model: path for each, path in added() if path != kept}
    if tables.model in {STAND_IN, *others}:
        raise KvtuneError(
            f"a source called {tables.model!r} is there already",
            where=str(others.get(tables.model, "packaged with kvtune")),
            hint="pack it under another --name, or remove that file.",
        )
    with atomic(kept) as temporary:
        shutil.copyfile(file, temporary)
    return tables, kept


def _check_usable(tables: Tables, where: str) -> None:
    packaged = packaged_tables()[0]
    if tables.options != packaged.options:
        hint = "kvtune tables pack writes files that fit."
        raise KvtuneError(
            "its options are not those of the packaged tables", where=where, hint=hint
        )
    if lacking := SPLITS - {sample.split for sample in tables.samples}:
        hint = "kvtune capture --workload full records all of them."
        raise KvtuneError(f"it has no {sorted(lacking)[0]!r} samples", where=where, hint=hint)


def _check_hash(file: Path, wanted: str, hint: str) -> None:
    if sha256(file) != wanted:
        raise KvtuneError("these tables do not match their hash", where=str(file), hint=hint)


def _data() -> Any:
    return resources.files("kvtune.tuner") / "data"


def _packaged_digest() -> str:
    return str((_data() / "SHA256SUMS").read_text().split()[0])


def _folder() -> Path:
    return cache_dir() / "sources"


def _added() -> list[Path]:
    return sorted(_folder().glob("*.safetensors"))
