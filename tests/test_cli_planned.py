"""What a policy's file was planned for is followed and told, by every command that costs it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kvtune.__main__ import main

SERVED = ("--rate", "20", "--requests", "20", "--prompt", "512", "--output", "16")
COMMANDS = {"estimate": (), "serve-sim": SERVED}
PLANNED = """kvtune_policy: 1
model: {{name: {name}, layers: 32, kv_heads: 8, head_dim: 128}}
policy: {{method: snapkv, budget: 25%}}
serving: {{weights: int4}}
"""


def answer(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    assert main([*words, "--gpu", "4090", "--json", "--quiet"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


@pytest.fixture
def planned(tmp_path: Path) -> Path:
    path = tmp_path / "policy.yaml"
    path.write_text(PLANNED.format(name="llama-3.1-8b"))
    return path


def format_of(found: dict[str, Any]) -> str:
    """The weights' format, where a command tells it."""
    return str(found["weight_format"] if "weight_format" in found else found["rows"][0]["weights"])


@pytest.mark.parametrize("command", COMMANDS)
def test_the_weights_are_those_of_the_plan_and_options_win(
    command: str, planned: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = (command, "--model", "llama-8b", *COMMANDS[command], "--policy", str(planned))
    found = answer(capsys, *words)
    assert format_of(found) == "int4"
    assert found["notes"] == ["planned for --weights int4, as the policy's file says"]
    said = answer(capsys, *words, "--weights", "fp8")
    assert (format_of(said), said["notes"]) == ("fp8", [])
    assert answer(capsys, *words, "--weights", "int4") == {**found, "notes": []}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_plan_for_another_model_is_told(
    command: str, planned: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = (*COMMANDS[command], "--policy", str(planned), "--weights", "int4")
    (note,) = answer(capsys, command, "--model", "qwen3-4b", *words)["notes"]
    assert note.startswith("planned for llama-3.1-8b: ")
    planned.write_text(PLANNED.format(name="Meta-Llama-3.1-8B-Instruct"))
    assert answer(capsys, command, "--model", "llama-8b", *words)["notes"] == []


def test_a_loss_is_that_of_the_model_it_was_planned_for(
    planned: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    planned.write_text(planned.read_text() + "provenance: {quality: {source: own trace}}\n")
    words = ("--policy", str(planned))
    ours = answer(capsys, "estimate", "--model", "llama-8b", *words)["quality"]
    theirs = answer(capsys, "estimate", "--model", "qwen3-4b", *words)["quality"]
    assert ours == "own trace, as its file says"
    assert theirs == f"{ours} of llama-3.1-8b"


def test_what_changes_nothing_of_a_simulated_queue_is_told(
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ("serve-sim", "--model", "llama-8b", "--weights", "int4", *SERVED)
    (note,) = answer(capsys, *words, "--order", "cached")["notes"]
    assert note.startswith("--order cached changes nothing")
    shared = ("--prompt", "256-1k", "--prefix", "512")
    (note,) = (found := answer(capsys, *words, *shared, "--order", "cached"))["notes"]
    alone = int(note.split()[0])
    assert note.startswith(f"{alone} of 20 prompts are shorter than --prefix 512")
    assert 0 < alone < 20
    assert found["policies"][0]["shared_tokens"] > 0
    assert answer(capsys, *words, "--prefix", "512", "--order", "cached")["notes"] == []


def test_a_beginning_that_no_prompt_can_share_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["serve-sim", "--model", "llama-8b", "--gpu", "4090"]
    assert main([*words, *SERVED, "--prefix", "513"]) == 2
    assert "--prefix to 512 or less" in capsys.readouterr().err
    file = tmp_path / "requests.csv"
    file.write_text("arrival_s,prompt_tokens,output_tokens\n0,100,1\n")
    assert main([*words, "--arrivals", str(file), "--prefix", "50"]) == 2
    assert "prefix_ids" in capsys.readouterr().err


SEARCHED = {"model": "llama-3.1-8b", "gpu": "rtx-4090", "memory_bytes": 16 * 10**9}


@pytest.fixture
def searched(planned: Path) -> Path:
    """A run directory on an RTX 4090 of which 16 GB may be used."""
    (planned.parent / "plans.jsonl").touch()
    (planned.parent / "config.json").write_text(json.dumps(SEARCHED))
    return planned.parent


def estimated(capsys: pytest.CaptureFixture[str], run: Path, *words: str) -> dict[str, Any]:
    asked = ["estimate", "--model", "llama-8b", "--policy", str(run), *words, "--json", "--quiet"]
    assert main(asked) in (0, 3)
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_an_estimate_takes_the_card_and_the_limit_of_the_search(
    searched: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    note = "searched with --gpu rtx-4090 --mem 16GB, as the policy's run says"
    found = estimated(capsys, searched)
    assert note in found["notes"]
    typed = estimated(capsys, searched, "--gpu", "4090", "--mem", "16GB")
    assert typed["rows"] == found["rows"]
    assert not any(note.startswith("searched") for note in typed["notes"])


@pytest.mark.parametrize(
    ("typed", "note"),
    [
        (("--gpu", "4090"), "searched with --mem 16GB, as the policy's run says"),
        (("--mem", "20GB"), "searched with --gpu rtx-4090, as the policy's run says"),
        (("--gpu", "l4"), None),
        (("--gpu", "l4,4090"), None),
        (("--gpu", "4090", "--gpu-memory", "12GB"), None),
    ],
)
def test_what_is_typed_wins_and_a_limit_is_of_its_own_card(
    typed: tuple[str, ...],
    note: str | None,
    searched: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    told = [each for each in estimated(capsys, searched, *typed)["notes"] if "searched" in each]
    assert told == ([note] if note else [])


@pytest.mark.parametrize("content", ["", "{", "[]", '{"memory_bytes": "16GB"}', '{"gpu": 1}'])
def test_a_damaged_configuration_is_named_with_what_to_do(
    content: str, searched: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (searched / "config.json").write_text(content)
    assert main(["estimate", "--model", "llama-8b", "--policy", str(searched)]) == 2
    told = capsys.readouterr().err
    assert str(searched / "config.json") in told
    assert "hint: run the same search again" in told
