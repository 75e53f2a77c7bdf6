"""Makes the texts of kinds ``guide`` and ``source`` of kvtune's own pages and sources of now.

    python benchmarks/own_texts.py

They were written after the models that kvtune ships were trained, so that these have not read them,
and are under kvtune's licence. They are kept as they were once, in ``traces/written/``, so that
samples stay the same while pages and sources change; making them anew changes every sample of both
kinds. They are of the tree from which commit cf8de6c7 was made, while it was being written: from
that commit this command makes 427 of the 430 guides and 98 of the 99 sources to the letter. The
other four (``CHANGELOG.md, 4``, ``docs/concepts.md, 10``, ``tuner/search_options.py, docstrings``
and ``traces/workloads.py``) changed before it was committed; the kept files are the record.

A guide is the running text of a page's section, without tables and shell blocks, or what a module's
docstrings say that is not among the sources, so that no split's guides explain another split's
sources.
"""

from __future__ import annotations

import ast
import gzip
import json
import re
from collections.abc import Iterator
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import TypeGuard

ROOT = Path(__file__).parents[1]
OUT = ROOT / "traces/written"
PAGES = ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "docs/*.md")
PACKAGES = (
    "cli", "common", "policies", "profiles", "runtime", "simulator", "traces", "tui", "tuner",
)  # fmt: skip
SOURCE_CHARACTERS = 640_000
SOURCE_SIZES = range(3_000, 40_000)
_LEFT_OUT = (
    re.compile(r"<!-- figures.*?end of figures -->", re.DOTALL),
    re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE),
)
_NO_PROSE = ("|", "<", "#", "!", "    ", "Args:", "Raises:", "Returns:")
_LEAST_CHARACTERS = 100  # of a paragraph: less is a caption or a command

Document = tuple[str, str]
"""A name and a text."""


def guide() -> Iterator[Document]:
    """Pages, then docstrings; paragraphs and list items are each on one line."""
    yield from sections()
    among = {name for name, _ in source()}
    for name, text in modules().items():
        found = [ast.get_docstring(node) for node in ast.walk(ast.parse(text)) if _has(node)]
        paragraphs = [each for doc in found if doc for each in _paragraphs(doc)]
        if name not in among and paragraphs:
            yield f"{name}, docstrings", "\n\n".join(paragraphs)


def _has(node: ast.AST) -> TypeGuard[ast.Module | ast.ClassDef | ast.FunctionDef]:
    return isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))


def sections() -> Iterator[Document]:
    """Every section of every page."""
    for path in sorted(path for pattern in PAGES for path in ROOT.glob(pattern)):
        text = path.read_text(encoding="utf-8")
        for pattern in _LEFT_OUT:
            text = pattern.sub("", text)
        for number, section in enumerate(re.split(r"^#+ .*$", text, flags=re.MULTILINE)):
            if paragraphs := list(_paragraphs(section)):
                name = f"{path.relative_to(ROOT).as_posix()}, {number}"
                yield name, "\n\n".join(paragraphs)


def _paragraphs(section: str) -> Iterator[str]:
    for block in re.split(r"\n\s*\n|\n(?=- )", section):
        paragraph = " ".join(line.strip() for line in block.strip().splitlines())
        if len(paragraph) >= _LEAST_CHARACTERS and not block.startswith(_NO_PROSE):
            yield paragraph


def source() -> Iterator[Document]:
    """Python sources of middle size, drawn by a hash of their names."""
    every, room = modules(), SOURCE_CHARACTERS
    for name in sorted(every, key=lambda name: sha256(name.encode()).digest()):
        if room > 0 and len(every[name]) in SOURCE_SIZES:
            yield name, every[name]
            room -= len(every[name])


@cache
def modules() -> dict[str, str]:
    """Texts of all modules of the package, by name."""
    paths = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
    return {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in paths}


def main() -> None:
    OUT.mkdir(exist_ok=True)
    for kind, documents in (("guide", guide()), ("source", source())):
        lines = [json.dumps({"name": n, "text": t}, ensure_ascii=False) for n, t in documents]
        packed = gzip.compress(("\n".join(lines) + "\n").encode(), 9, mtime=0)
        (OUT / f"{kind}.jsonl.gz").write_bytes(packed)
        print(kind, len(lines), "documents", len(packed), "bytes")


if __name__ == "__main__":
    main()
