"""The pages are true: commands exist and run, links lead somewhere, generated pages are new."""

from __future__ import annotations

import importlib.util
import re
import shlex
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

import kvtune
from kvtune.__main__ import main
from kvtune.cli.app import build
from kvtune.policies.policy_file.document import read_policy
from kvtune.tuner.search_options import search_request

ROOT = Path(kvtune.__file__).parent
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
FENCE = re.compile(
    r"(?:<!-- (?P<run>run(?:: full)?) -->\n)?^ *```(?P<kind>[^\n]*)\n(?P<text>.*?)^ *```",
    re.M | re.S,
)


def reference() -> ModuleType:
    spec = importlib.util.spec_from_file_location("reference", DOCS / "reference.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def blocks(page: Path) -> list[re.Match[str]]:
    return list(FENCE.finditer(page.read_text(encoding="utf-8")))


def commands_of(text: str) -> list[list[str]]:
    """The words of every line that begins with kvtune; lines that go on are joined."""
    lines = text.replace("\\\n", " ").splitlines()
    parts = [part for line in lines for part in line.split(";")]
    found = [
        shlex.split(part, comments=True) for part in parts if part.strip().startswith("kvtune ")
    ]
    return [words[1:] for words in found]


def test_generated_pages_are_what_the_code_says() -> None:
    for name, text in reference().pages().items():
        kept = (DOCS / "reference" / name).read_text(encoding="utf-8")
        assert kept == text, "run: python docs/reference.py"


def test_the_example_of_a_policy_file_is_one() -> None:
    policy = read_policy(reference().EXAMPLE).bind(6, 2)
    assert [options[0].keys.name for options in policy.heads] == ["int4"] * 6
    assert [options[0].method.name for options in policy.heads] == [
        "full", "snapkv", "snapkv", "snapkv", "snapkv", "full",
    ]  # fmt: skip


def options_of(words: list[str]) -> tuple[Any, list[str]]:
    command = build()
    while words and hasattr(command, "commands") and words[0] in command.commands:
        command, words = command.commands[words[0]], words[1:]
    return command, words


@pytest.mark.parametrize("page", [ROOT / "README.md", *PAGES], ids=lambda page: page.name)
def test_every_command_and_option_exists(page: Path) -> None:
    for block in blocks(page):
        for words in commands_of(block["text"]):
            command, rest = options_of(words)
            assert command is not build() or all(word.startswith("-") for word in rest), words
            known = {name for param in command.params for name in param.opts} | {"--help", "-h"}
            given = {word.partition("=")[0] for word in rest if re.match(r"--?[a-z]", word)}
            if hasattr(command, "commands"):
                known |= {"--version", "--install-completion"}
            assert given <= known, f"{page.name}: kvtune {' '.join(words)}"


def runnable() -> list[Path]:
    return [page for page in PAGES if any(block["run"] for block in blocks(page))]


def run_page(page: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, *kinds: str) -> int:
    """Run a page's blocks in order, in a folder and a cache of their own; how many commands ran."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr("kvtune.cli.config.user_file", lambda: folder / "none.toml")
    monkeypatch.setenv("KVTUNE_CACHE", str(folder / "cache"))
    ran = 0
    for block in blocks(page):
        if title := re.search(r'title="([\w.-]+)"', block["kind"]):
            (folder / title[1]).write_text(block["text"], encoding="utf-8")
        if block["run"] in kinds:
            for words in commands_of(block["text"]):
                assert main(words) == 0, f"{page.name}: kvtune {' '.join(words)}"
                ran += 1
    return ran


@pytest.mark.parametrize("page", runnable(), ids=lambda page: page.name)
def test_the_examples_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        assert run_page(page, tmp_path, monkeypatch, "run")
    finally:
        from kvtune.profiles.gpus import forget_cards

        forget_cards()


@pytest.mark.full
def test_the_tutorial_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_page(DOCS / "tutorial.md", tmp_path, monkeypatch, "run", "run: full") > 8
    assert list((tmp_path / "kvtune-runs").glob("*/card/card.svg"))


@pytest.mark.parametrize("page", [DOCS / "tutorial.md", ROOT / "README.md"], ids=lambda p: p.name)
def test_run_directories_that_a_page_names_are_those_its_searches_make(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    searches = [words[1:] for b in blocks(page) for words in commands_of(b["text"])
                if words[0] == "search"]  # fmt: skip
    made = {run_directory(words) for words in searches}
    named = set(re.findall(r"kvtune-runs/[\w.-]+\w", text))
    assert named
    assert named <= made


def run_directory(words: list[str]) -> str:
    """Where a search with these options puts everything."""
    given = build().commands["search"].make_context("search", words).params
    names = ("context", "stack", "moved_bytes")
    asked = {name: given[name] for name in names if given[name] is not None}
    return str(search_request(given["model"], given["gpu"], given["mem"], **asked).run_dir)


def test_every_page_is_in_the_site_and_every_link_leads_to_a_file() -> None:
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    listed = set(re.findall(r"[\w/-]+\.md", text))
    assert listed == {page.relative_to(DOCS).as_posix() for page in PAGES}
    for page in [ROOT / "README.md", *PAGES]:
        links = re.findall(r"\]\((?!https?:)([^)#\s]+)", page.read_text(encoding="utf-8"))
        assert [link for link in links if not (page.parent / link).exists()] == [], page.name


def test_the_citation_names_this_version() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert cited["version"] == kvtune.__version__
    assert cited["license"] == "Apache-2.0"
