"""The header of a GGUF file: its keys and the types and sizes of its tensors, with bounds.

Arrays of texts (a tokenizer's) are counted and skipped, so that a header is read in a moment.
"""

from __future__ import annotations

import math
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from kvtune.common.errors import KvtuneError

_MOST_KEYS, _MOST_TENSORS, _MOST_TEXT, _MOST_LIST = 10_000, 200_000, 2**20, 4096
_NUMBERS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
_TEXT, _ARRAY = 8, 9
_SHARD = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")
HINT = "a Hugging Face folder of the same model works too."


@dataclass(frozen=True)
class Tensor:
    """One tensor: its shape, the name of its number format, and its bytes."""

    shape: tuple[int, ...]
    format: str
    bytes: int

    @property
    def numbers(self) -> int:
        """How many numbers the tensor holds."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Header:
    """Keys and tensors of a model, over all its files.

    Args:
        path: of the first file.
        keys: by name; an array of texts, or a long one, is its length.
        tensors: by name.
    """

    path: Path
    keys: dict[str, Any]
    tensors: dict[str, Tensor]


def read_header(path: Path) -> Header:
    """The header of a file, and of the others of a model that was split.

    Raises:
        KvtuneError: no such file, no GGUF, or a file of the model is not there.
    """
    files = _shards(path)
    keys: dict[str, Any] = {}
    tensors: dict[str, Tensor] = {}
    for file in files:
        if not file.is_file():
            others = "" if len(files) == 1 else f"; the model has {len(files)} files"
            raise KvtuneError(f"there is no such file{others}", where=str(file))
        with file.open("rb") as stream:
            found = _Reader(stream, file).header()
        keys = {**found.keys, **keys}
        tensors |= found.tensors
    return Header(path, keys, tensors)


def _shards(path: Path) -> list[Path]:
    match = _SHARD.fullmatch(path.name)
    if match is None:
        return [path]
    stem, _, total = match.groups()
    return [path.with_name(f"{stem}-{i:05}-of-{total}.gguf") for i in range(1, int(total) + 1)]


class _Reader:
    """Little-endian values of one file."""

    def __init__(self, stream: BinaryIO, path: Path) -> None:
        self.stream, self.path = stream, path

    def fail(self, what: str) -> NoReturn:
        raise KvtuneError(f"this is no readable GGUF file: {what}", where=str(self.path), hint=HINT)

    def number(self, code: str) -> Any:
        size = struct.calcsize(f"<{code}")
        raw = self.stream.read(size)
        if len(raw) < size:
            self.fail("it ends within its header")
        return struct.unpack(f"<{code}", raw)[0]

    def count(self, most: int, what: str) -> int:
        value = int(self.number("Q"))
        if value > most:
            self.fail(f"more {what} than any model has")
        return value

    def text(self) -> str:
        length = self.count(_MOST_TEXT, "letters of a text")
        raw = self.stream.read(length)
        if len(raw) < length:
            self.fail("it ends within its header")
        return raw.decode("utf-8", errors="replace")

    def value(self, kind: int, key: str) -> Any:
        if kind == _TEXT:
            return self.text()
        if kind == _ARRAY:
            return self.array(key)
        if kind not in _NUMBERS:
            self.fail(f"an unknown type of {key[:60]!r}")
        return self.number(_NUMBERS[kind])

    def array(self, key: str) -> Any:
        kind, length = self.number("I"), self.count(2**24, f"entries of {key[:60]!r}")
        if kind in _NUMBERS and length > _MOST_LIST:
            self.stream.seek(length * struct.calcsize(f"<{_NUMBERS[kind]}"), 1)
            return length
        if kind == _TEXT:
            for _ in range(length):
                self.stream.seek(self.count(_MOST_TEXT, "letters of a text"), 1)
            return length
        if kind not in _NUMBERS:
            self.fail(f"a nested list in {key[:60]!r}")
        return [self.number(_NUMBERS[kind]) for _ in range(length)]

    def header(self) -> Header:
        if self.stream.read(4) != b"GGUF":
            self.fail("it does not begin with GGUF")
        version = self.number("I")
        if version not in (2, 3):
            self.fail(f"version {version}, or of a machine with the other byte order")
        tensors, keys = self.count(_MOST_TENSORS, "tensors"), self.count(_MOST_KEYS, "keys")
        values = {}
        for _ in range(keys):
            key = self.text()
            values[key] = self.value(self.number("I"), key)
        return Header(self.path, values, dict(self.tensor() for _ in range(tensors)))

    def tensor(self) -> tuple[str, Tensor]:
        import gguf

        name, dimensions = self.text(), self.number("I")
        if not 1 <= dimensions <= 4:
            self.fail(f"{name[:60]!r} has {dimensions} dimensions")
        shape = tuple(self.count(2**32, "rows of a tensor") for _ in range(dimensions))
        if not all(shape):
            self.fail(f"{name[:60]!r} is empty")
        kind, _ = self.number("I"), self.number("Q")
        try:
            form = gguf.GGMLQuantizationType(kind)
        except ValueError:
            self.fail(f"{name[:60]!r} is of an unknown type")
        block, size = gguf.GGML_QUANT_SIZES[form]
        numbers = math.prod(shape)
        if numbers > 2**45:
            self.fail(f"{name[:60]!r} is larger than any model")
        return name, Tensor(shape, form.name, -(-numbers // block) * size)
