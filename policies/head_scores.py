"""Scores of a model's heads as a file: who retrieves, who induces, who only looks at the sink.

One safetensors file holds any number of scores of one model, each ``[L, heads]``, with what they
were measured by in its metadata. Published files are read and written too: tables of gates, one row
a layer and one column a KV head (DuoAttention, RLKV), and ``{"layer-head": [score, ...]}`` of query
heads (Retrieval Head, HeadKV).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from kvtune.common.bounds import Finite, Name
from kvtune.common.errors import KvtuneError, nearest
from kvtune.common.files import atomic, write_text
from kvtune.common.stored import checked, parse_json, read_bytes, read_json, read_text

Floats = NDArray[np.float32]
Heads = Literal["query heads", "KV heads"]
_FORMAT = "1"
_KEY = re.compile(r"(0|[1-9][0-9]{0,4})-(0|[1-9][0-9]{0,4})")
_MOST_HEADER = 2**20


@dataclass(frozen=True)
class About:
    """What a score is.

    Args:
        heads: whose it is.
        method: what measured it.
        data: on what.
        seed: of what was drawn; None where nothing was.
    """

    heads: Heads
    method: Name
    data: str = ""
    seed: int | None = None


@dataclass(frozen=True, eq=False)
class HeadScores:
    """Scores of one model.

    Args:
        model: its name.
        fingerprint: of its weights; empty where a published file does not say.
        scores: ``[L, heads]`` by name; larger is more of it.
        about: of the same names.
    """

    model: str
    fingerprint: str
    scores: Mapping[str, Floats]
    about: Mapping[str, About]

    def __post_init__(self) -> None:
        """Refuse scores that do not belong together."""
        if set(self.scores) != set(self.about) or not self.scores:
            raise KvtuneError("every score needs its description, and there must be one")
        for name, score in self.scores.items():
            if score.ndim != 2 or not score.size or not np.isfinite(score).all():
                raise KvtuneError(f"the score {name!r} is no table of finite numbers")
        if len({len(score) for score in self.scores.values()}) > 1:
            raise KvtuneError("the scores are of models with different numbers of layers")

    def score(self, name: str) -> Floats:
        """The values of one score for every layer and head.

        Raises:
            KvtuneError: there is none of that name.
        """
        if name not in self.scores:
            raise KvtuneError(f"no score is called {name!r}", hint=nearest(name, self.scores))
        return self.scores[name]

    def of_kv_heads(self, name: str, kv_heads: int) -> Floats:
        """One score ``[L, H]``: of query heads the highest of each group.

        Raises:
            KvtuneError: heads that are no whole groups of so many.
        """
        score = self.score(name)
        heads = score.shape[1]
        if heads % kv_heads or (self.about[name].heads == "KV heads" and heads != kv_heads):
            raise KvtuneError(
                f"the score {name!r} is of {heads} {self.about[name].heads} a layer, "
                f"the model has {kv_heads} KV heads",
                hint="detect or import the heads of this model.",
            )
        grouped: Floats = score.reshape(len(score), kv_heads, -1).max(-1)
        return grouped

    def joined(self, other: HeadScores) -> HeadScores:
        """These and another's, which replace those of the same name.

        Raises:
            KvtuneError: they are of different models.
        """
        both = self.fingerprint, other.fingerprint
        if self.model != other.model or ("" not in both and len(set(both)) > 1):
            raise KvtuneError(
                f"these are heads of {self.model}, and those of {other.model}",
                hint="write them to another file.",
            )
        scores, about = {**self.scores, **other.scores}, {**self.about, **other.about}
        return HeadScores(self.model, self.fingerprint or other.fingerprint, scores, about)


@dataclass(frozen=True)
class _Header:
    """The metadata of the file."""

    kvtune_heads: Literal["1"]
    model: Name
    fingerprint: str
    about: dict[str, About]


def write_heads(heads: HeadScores, path: Path) -> None:
    """Write all scores atomically."""
    from safetensors.numpy import save_file

    about = {name: asdict(each) for name, each in sorted(heads.about.items())}
    metadata = {
        "kvtune_heads": _FORMAT,
        "model": heads.model,
        "fingerprint": heads.fingerprint,
        "about": json.dumps(about),
    }
    tensors = {name: np.ascontiguousarray(s, np.float32) for name, s in heads.scores.items()}
    with atomic(path) as temporary:
        save_file(tensors, temporary, metadata)


def read_heads(path: Path) -> HeadScores:
    """Read what ``write_heads`` wrote.

    Raises:
        KvtuneError: it is no such file, or something in it is wrong.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load

    where, again = str(path), "kvtune heads detect or import makes such a file."
    data = read_bytes(path, again)
    try:
        tensors = load(data)
    except (SafetensorError, ValueError, KeyError) as error:
        raise KvtuneError(f"is no safetensors file ({error})", where=where, hint=again) from error
    length = int.from_bytes(data[:8], "little")
    if length > _MOST_HEADER:
        raise KvtuneError("has an oversized header", where=where, hint=again)
    header = parse_json(data[8 : 8 + length], where, again)
    fields = dict(header.get("__metadata__") or {})
    if "about" in fields:
        fields["about"] = parse_json(fields["about"], where, again)
    found = checked(_Header, fields, where, again)
    if any(tensor.dtype != np.float32 for tensor in tensors.values()):
        raise KvtuneError("holds numbers that are not float32", where=where, hint=again)
    try:
        return HeadScores(found.model, found.fingerprint, tensors, found.about)
    except KvtuneError as error:
        raise KvtuneError(str(error), where=where, hint=again) from error


def read_gates(path: Path) -> Floats:
    """A published table of gates, ``[L, H]``, clipped to 0 to 1 as its authors do.

    Raises:
        KvtuneError: rows of different lengths, or something that is no number; with the line.
    """
    rows: list[list[float]] = []
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        where = f"{path}:{number}"
        try:
            row = [float(cell) for cell in line.split()]
        except ValueError as error:
            raise KvtuneError("is no row of numbers", where=where) from error
        if not row or not np.isfinite(row).all():
            raise KvtuneError("is no row of finite numbers", where=where)
        if rows and len(row) != len(rows[0]):
            raise KvtuneError(
                f"has {len(row)} columns, the first line has {len(rows[0])}", where=where
            )
        rows.append(row)
    if not rows:
        raise KvtuneError("is empty", where=str(path), hint="one row a layer, one column a KV head")
    return np.clip(np.array(rows, np.float32), 0, 1)


def write_gates(gates: Floats, path: Path) -> None:
    """The same table: one row a layer, tabs between KV heads."""
    rows = ["\t".join(f"{value:.8g}" for value in row) for row in gates.tolist()]
    write_text(path, "\n".join(rows) + "\n")


def read_retrieval(path: Path) -> Floats:
    """A published ``{"layer-head": [score, ...]}``, the mean over samples, ``[L, Hq]``.

    Raises:
        KvtuneError: another form, or a head is missing.
    """
    fields = read_json(path)
    samples = checked(dict[str, tuple[Finite, ...]], fields, str(path))
    means: dict[tuple[int, int], float] = {}
    for key, values in samples.items():
        match = _KEY.fullmatch(key)
        if match is None or not values:
            raise KvtuneError(f"{key!r} is no 'layer-head' with scores", where=str(path))
        means[int(match[1]), int(match[2])] = float(np.mean(values))
    if not means:
        raise KvtuneError("holds no head", where=str(path))
    layers, heads = (max(each) + 1 for each in zip(*means, strict=True))
    if len(means) != layers * heads:
        raise KvtuneError(
            f"holds {len(means)} heads of {layers} layers of {heads}", where=str(path)
        )
    found = np.zeros((layers, heads), np.float32)
    for at, mean in means.items():
        found[at] = mean
    return found


def write_retrieval(scores: Floats, path: Path) -> None:
    """The same form, one score a head."""
    rows = enumerate(scores.tolist())
    found: dict[str, Any] = {
        f"{layer}-{head}": [score] for layer, row in rows for head, score in enumerate(row)
    }
    write_text(path, json.dumps(found) + "\n")
