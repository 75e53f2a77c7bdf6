"""The policy card: one page in three forms, all of them from the same figures."""

from __future__ import annotations

import json
import os
import shlex
from pathlib import Path
from xml.etree import ElementTree

import pytest
from pydantic import TypeAdapter, ValidationError

import kvtune
from kvtune.__main__ import main
from kvtune.cli.card import schema
from kvtune.cli.policy_card import Card
from kvtune.tests.made_up import write_study
from kvtune.tui.selected import Selected, cost_rows
from kvtune.tuner.explore.reader import StudyReader
from kvtune.tuner.explore.view import View
from kvtune.tuner.explore.what_if import Setting, figures_of

SCHEMA = Path(kvtune.__file__).parent / "docs" / "card.schema.json"
HOSTILE = "<script>alert(1)</script>|`*\x1b[2J"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_study(tmp_path / "run", live=True)


def test_the_committed_schema_is_the_cards() -> None:
    """Remake it with ``KVTUNE_REMAKE_GOLDEN=1 pytest tests/test_card.py``."""
    text = json.dumps(schema(), indent=2) + "\n"
    if os.environ.get("KVTUNE_REMAKE_GOLDEN"):
        SCHEMA.write_text(text)
    assert SCHEMA.read_text() == text


def test_all_forms_say_the_same(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["card", str(run), "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    card = json.loads((run / "card" / "card.json").read_text())
    assert answer["card"] == card
    assert answer["files"] == [str(run / "card" / f"card.{kind}") for kind in ("md", "json", "svg")]
    markdown = (run / "card" / "card.md").read_text()
    root = ElementTree.fromstring((run / "card" / "card.svg").read_text())  # noqa: S314 - our own
    for text in (markdown, " ".join(root.itertext())):
        assert all(word in text for word in card["verdict"].replace("(", "").split()[:6])
        assert all(policy["name"] in text for policy in card["policies"])
        assert f"{card['prompt_bytes'] / 2**20:.2f}" in text
        assert "c0ffee" in text
        for task in card["tasks"]:
            low, high = task["predicted"]["interval"]
            assert low < task["predicted"]["value"] < high
            assert f"{low:.2g}, {high:.2g}" in text
        assert "RULER's multi-key needles" in text
    assert [task["name"] for task in card["tasks"]] == ["code", "prose", "retrieval"]
    assert sum(budget["chosen"] for budget in card["budgets"]) == 1
    sizes = [budget["prompt_bytes"] for budget in card["budgets"]]
    assert sizes == sorted(sizes)
    assert len(sizes) <= 9
    for budget in card["budgets"]:
        assert budget["policy"].startswith(("by head, mostly ", "by layer, mostly "))
        assert budget["policy"] in markdown.replace("\\", "")


def test_a_card_reads_back_by_its_schema(run: Path) -> None:
    main(["card", str(run)])
    text = (run / "card" / "card.json").read_text()
    read = TypeAdapter(Card).validate_json(text)
    assert read.kl.unit == "nats/token"
    wrong = json.loads(text) | {"kvtune_card": 1}
    with pytest.raises(ValidationError):
        TypeAdapter(Card).validate_python(wrong)


def test_the_command_is_the_search_that_was_asked_for(run: Path) -> None:
    asked = {
        "model": "/home/someone/models/my model", "gpu": "rtx-4090", "context_tokens": 4096,
        "longest_context": 8192, "max_kl": None, "sequences": 3, "stand_in": True,
    }  # fmt: skip
    (run / "config.json").write_text(json.dumps(asked))
    main(["card", str(run)])
    words = shlex.split(json.loads((run / "card" / "card.json").read_text())["command"])
    options = dict(zip(words[2::2], words[3::2], strict=False))
    assert words[:2] == ["kvtune", "search"]
    assert options["--model"] == "my model"  # no path of this machine
    assert (options["--mem"], options["--context"], options["--batch"]) == (
        "16GB",
        "4096-8192",
        "3",
    )
    assert words[-1] == "--stand-in"


def test_strings_of_a_study_are_escaped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_study(tmp_path / "run", live=True)
    result = json.loads((run / "result.json").read_text())
    result["baselines"][1]["name"] = HOSTILE
    result["provenance"]["trace"] = HOSTILE
    (run / "result.json").write_text(json.dumps(result))
    if main(["card", str(run)]) != 0:
        pytest.fail(capsys.readouterr().err)
    assert "\x1b[2J" not in capsys.readouterr().out
    markdown, picture = ((run / "card" / f"card.{kind}").read_text() for kind in ("md", "svg"))
    for text in (markdown, picture):
        assert "<script>" not in text
        assert "\x1b" not in text
    root = ElementTree.fromstring(picture)  # noqa: S314 - our own file
    assert {each.tag.rpartition("}")[2] for each in root.iter()} <= {
        "svg", "title", "style", "rect", "text",
    }  # fmt: skip
    (row,) = [line for line in markdown.splitlines() if line.startswith("| &lt;script")]
    assert row.replace("\\|", "").count("|") == 6


def test_a_search_that_has_not_finished_has_no_card(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_study(tmp_path / "run", finished=False)
    assert main(["card", str(run)]) == 2
    assert "a card is of a finished one" in capsys.readouterr().err
    assert not (run / "card").exists()


def test_the_card_of_a_plan_for_a_stack_counts_as_the_stack_does(tmp_path: Path) -> None:
    """Where sequences were counted by the stack and memory was not, they were beyond the limit."""
    search = "search --model llama-8b --gpu 4090 --mem 16GB --for vllm --quiet --run-dir"
    assert main([*search.split(), str(tmp_path)]) == 0
    assert main(["card", str(tmp_path)]) == 0
    card = json.loads((tmp_path / "card" / "card.json").read_text())
    assert card["memory"]["value"] <= 16e9
    low, high = card["at_once"]["interval"]
    assert low < card["sequences"] < high
    assert "--for vllm" in card["command"]
    for form in ("md", "svg"):
        assert "as vllm lays plans out" in (tmp_path / "card" / f"card.{form}").read_text()
    study = StudyReader(tmp_path).read()
    setting = Setting.asked(study.facts)
    view = View(study, figures_of(study, setting), setting)
    assert study.chosen is not None
    assert "as vllm lays plans out" in dict(cost_rows(Selected(view, study.chosen)))["counted"]
