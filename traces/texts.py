"""Text that is on every machine or comes with kvtune, and the user's own, dealt to splits.

Documents are dealt whole; a passage that also stands in another split's documents is then left
out of one of them, so that no run of ``SHARED_WORDS`` words is in two splits.
"""

from __future__ import annotations

import gzip
import random
import re
import sysconfig
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from importlib import resources
from pathlib import Path

from kvtune.common.errors import KvtuneError
from kvtune.common.stored import parse_json, read_text
from kvtune.traces.made_up_texts import MAKERS
from kvtune.traces.samples import SPLITS, Split

SHARES: Mapping[Split, float] = {"search": 0.4, "select": 0.2, "evaluate": 0.4}
"""Share of the text that each split gets."""

SHARED_WORDS = 24
_PARAGRAPHS_A_TURN = 3

_CODE_CHARACTERS = 1_500_000
_CODE_SIZES = range(6_000, 80_000)
_CODE_FOLDERS = (
    ".", "asyncio", "collections", "concurrent/futures", "email", "html", "http", "importlib",
    "json", "logging", "multiprocessing", "tkinter", "unittest", "urllib", "wsgiref", "xml/dom",
    "xml/etree", "xml/sax", "xmlrpc",
)  # fmt: skip
_WORD = re.compile(r"\w+|[^\w\s]")


@dataclass(frozen=True)
class Document:
    """A named text."""

    name: str
    text: str


def words(text: str) -> list[str]:
    """Words and signs, the units in which splits are compared."""
    return _WORD.findall(text)


@cache
def prose() -> Mapping[Split, tuple[Document, ...]]:
    """English prose by split: the Python language reference that ``help()`` shows."""
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise KvtuneError(
            "this Python has no pydoc_data, whose texts the prose samples are cut from",
            hint="install Python's complete standard library, or give your own text.",
        ) from error
    return _deal([Document(name, text) for name, text in topics.items()])


@cache
def code() -> Mapping[Split, tuple[Document, ...]]:
    """Code by split: the Python standard library's own sources."""
    root = Path(sysconfig.get_path("stdlib"))
    paths = sorted(p for folder in _CODE_FOLDERS for p in (root / folder).glob("*.py"))
    names = {p.relative_to(root).as_posix(): p for p in paths if not p.name.startswith("_sysconf")}
    documents: list[Document] = []
    room = _CODE_CHARACTERS
    for name in sorted(names, key=lambda name: sha256(name.encode()).digest()):
        if room > 0 and names[name].stat().st_size in _CODE_SIZES:
            documents.append(Document(name, names[name].read_text(encoding="utf-8")))
            room -= len(documents[-1].text)
    if not documents:
        hint = "install Python's complete standard library, or give your own text."
        raise KvtuneError("the standard library's sources are missing", where=str(root), hint=hint)
    return _deal(documents)


def chat() -> Mapping[Split, tuple[Document, ...]]:
    """Conversations by split: questions about the language reference, answered from it in turns."""
    return _in_turns(prose())


def further(kind: str) -> Mapping[Split, tuple[Document, ...]]:
    """What follows where a split's own texts of a kind end: long samples need more than these have.

    Python's language reference is 100,000 tokens in all; kvtune's own pages go on behind it.
    """
    if kind not in ("prose", "chat"):
        return dict.fromkeys(SPLITS, ())
    return written("guide") if kind == "prose" else _in_turns(written("guide"))


def _in_turns(
    documents: Mapping[Split, tuple[Document, ...]],
) -> Mapping[Split, tuple[Document, ...]]:
    """The same documents as conversations about them."""
    return {
        split: tuple(Document(d.name, "\n\n".join(_turns(d))) for d in some)
        for split, some in documents.items()
    }


WRITTEN = ("guide", "source")
"""Kinds of text that kvtune's own pages and sources are, as they once were."""


@cache
def written(kind: str) -> Mapping[Split, tuple[Document, ...]]:
    """kvtune's own pages (``guide``) or Python sources (``source``), by split.

    Written in 2026, after the models that are packaged were trained, and under kvtune's licence;
    kept as ``benchmarks/own_texts.py`` once found them, so that samples stay the same.
    """
    packed = (resources.files("kvtune.traces") / f"written/{kind}.jsonl.gz").read_bytes()
    lines = gzip.decompress(packed).decode("utf-8").split("\n")
    return _deal([Document(**parse_json(line, kind)) for line in lines if line])


_MADE_UP_DOCUMENTS = 24  # of a split


@cache
def made_up(kind: str) -> Mapping[Split, tuple[Document, ...]]:
    """Texts that code makes up, by split: each document is drawn from a stream of its own."""
    dealt: dict[Split, list[Document]] = {split: [] for split in SPLITS}
    for split, documents in dealt.items():
        for number in range(_MADE_UP_DOCUMENTS):
            name = f"{kind}/{split}/{number}"
            paragraphs = MAKERS[kind](random.Random(name))  # noqa: S311 - samples, not secrets
            documents.append(Document(name, "\n\n".join(paragraphs)))
    return _without_shared(dealt)


def _turns(document: Document) -> Iterator[str]:
    """Every few paragraphs the user asks on, and now and then for what was said before."""
    subject = document.name.replace("-", " ").lower()
    paragraphs = [p.strip() for p in document.text.split("\n\n") if p.strip()]
    for first in range(0, len(paragraphs), _PARAGRAPHS_A_TURN):
        asked = f"What should I know about {subject}?" if first == 0 else "What else?"
        yield f"User: {asked}"
        yield "Assistant: " + "\n\n".join(paragraphs[first : first + _PARAGRAPHS_A_TURN])
    yield f"User: Thank you. How did your answer about {subject} begin?"
    yield f"Assistant: It began like this: {paragraphs[0]}"


def user(paths: Sequence[Path]) -> Mapping[Split, tuple[Document, ...]]:
    """The user's texts by split.

    Args:
        paths: ``.txt`` files, one document each, and ``.jsonl`` files, one a line.

    Raises:
        KvtuneError: a file cannot be read, or a line is no ``{"text": "..."}``.
    """
    documents = [document for path in paths for document in _read(Path(path))]
    if len(documents) < 3 * len(SPLITS):
        documents = [piece for document in documents for piece in _pieces(document)]
    return _deal(documents)


def _read(path: Path) -> Iterator[Document]:
    if path.suffix.lower() not in (".txt", ".jsonl"):
        raise KvtuneError("is neither .txt nor .jsonl", where=str(path))
    text = read_text(path, "save it as UTF-8.").replace("\r\n", "\n").replace("\r", "\n")
    if path.suffix.lower() == ".txt":
        yield Document(path.name, text)
        return
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield Document(f"{path.name}:{number}", _text_of(line, f"{path}:{number}"))


def _text_of(line: str, where: str) -> str:
    hint = 'each line must be an object with a text: {"text": "..."}.'
    value = parse_json(line, where, hint)
    text = value.get("text") if isinstance(value, dict) else None
    if not isinstance(text, str):
        raise KvtuneError('has no "text" that is a string', where=where, hint=hint)
    return text


def _pieces(document: Document) -> Iterator[Document]:
    """A long document as consecutive stretches of whole lines, so that few can be dealt too."""
    lines = document.text.splitlines(keepends=True)
    size = max(1, -(-len(lines) // 20))
    for first in range(0, len(lines), size):
        stretch = "".join(lines[first : first + size])
        yield Document(f"{document.name}, from line {first + 1}", stretch)


def _deal(documents: Sequence[Document]) -> Mapping[Split, tuple[Document, ...]]:
    """Deal documents by size, then drop the passages that two splits would share."""
    dealt: dict[Split, list[Document]] = {split: [] for split in SPLITS}
    sizes = dict.fromkeys(SPLITS, 0)
    for document in sorted(documents, key=lambda d: (-len(d.text), d.name)):
        split = min(SPLITS, key=lambda s: (sizes[s] + len(document.text)) / SHARES[s])
        dealt[split].append(document)
        sizes[split] += len(document.text)
    return _without_shared(dealt)


def _without_shared(
    dealt: Mapping[Split, Sequence[Document]],
) -> Mapping[Split, tuple[Document, ...]]:
    """Drop every paragraph that completes a run of words seen before in another split.

    Evaluation comes first and so keeps all of its text: its figures gain most from more samples.
    """
    owner: dict[int, Split] = {}
    kept: dict[Split, tuple[Document, ...]] = {}
    for split in reversed(SPLITS):
        documents = []
        for document in dealt[split]:
            text = "\n\n".join(_own_paragraphs(document.text, split, owner))
            if text.strip():
                documents.append(Document(document.name, text))
        kept[split] = tuple(documents)
    return kept


def _own_paragraphs(text: str, split: Split, owner: dict[int, Split]) -> Iterator[str]:
    before: list[str] = []
    for paragraph in text.split("\n\n"):
        run = before + words(paragraph)
        hashes = [
            hash(tuple(run[i : i + SHARED_WORDS])) for i in range(len(run) - SHARED_WORDS + 1)
        ]
        if any(owner.get(h, split) != split for h in hashes):
            continue
        owner.update(dict.fromkeys(hashes, split))
        before = run[-(SHARED_WORDS - 1) :]
        yield paragraph
