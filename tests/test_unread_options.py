"""What a question does not read is refused where it was typed."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvtune.__main__ import main
from kvtune.cli.unread import UNREAD

SEARCH = ("search", "--model", "smollm2-135m", "--gpu", "4090", "--context", "1k")
SERVED = ("serve-sim", "--model", "llama-8b", "--gpu", "4090")
VALUES = {
    "batch": "2", "max_kl": "0.1", "trials": "9", "menu": "all", "stack": "vllm",
    "read_bytes": "5MB", "tpot": "9ms", "ttft": "1s", "sequences": "2", "sampler": "tpe",
    "jobs": "2", "storage": "sqlite:///a.db", "engine": "processes:2", "start": "a.yaml",
    "moved_bytes": "5MB", "heads": "a.safetensors", "stand_in": None, "rate": "4",
    "requests": "9", "prompt": "1k", "output": "9", "length_cv": "1", "burstiness": "2",
    "prefix": "50", "concurrency": "8",
}  # fmt: skip
OPTIONS = {"stack": "--for"}


@pytest.mark.parametrize(
    ("question", "name"), [(question, name) for question in UNREAD for name in UNREAD[question]]
)
def test_what_a_question_does_not_read_is_refused(
    question: str, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    option, value = OPTIONS.get(name, f"--{name.replace('_', '-')}"), VALUES[name]
    asked = {
        "held_bytes": (*SEARCH, "--held-bytes", "10%", "--run-dir", str(tmp_path / "run")),
        "arrivals": (*SERVED, "--arrivals", "requests.csv"),
        "stack": (*SEARCH, "--for", "vllm", "--run-dir", str(tmp_path / "run")),
    }
    assert main([*asked[question], option, *([value] if value else [])]) == 2
    assert f"cannot be combined with {option}" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("by", "option"),
    [((), "--steps"), (("--by", "attention"), "--steps"), (("--by", "duo"), "--block")],
)
def test_one_way_to_score_heads_refuses_what_only_another_reads(
    by: tuple[str, ...], option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "found.safetensors"
    # A model whose weights are nowhere: what went on would be refused for that.
    words = ("heads", "detect", "--model", "llama-8b", *by, option, "5", "--out", str(out))
    assert main([*words]) == 2
    told = capsys.readouterr().err
    assert f"{by[-1] if by else 'attention'} cannot be combined with {option}" in told
    assert "hint:" in told


def test_several_are_named_together_and_defaults_are_not(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main([*SEARCH, "--jobs", "2", "--held-bytes", "10%", "--start", "a.yaml"]) == 2
    told = capsys.readouterr().err
    assert "cannot be combined with --jobs or --start" in told
    assert "--trials" not in told
