"""A mistake in what was typed is refused before anything that takes seconds to import."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from kvtune.cli.app import build

HEAVY = ("torch", "transformers", "optuna", "scipy", "matplotlib", "textual", "pandas")
"""Each takes from half a second to several."""

SERVED = ("--model", "llama-8b", "--gpu", "4090")
POLICY = "kvtune_policy: 1\npolicy: {method: snapkv, budget: 25%}\n"
TINY = {
    "policy.yaml": POLICY,
    "misspelt.yaml": POLICY.replace("snapkv", "snapkw"),
    "text.txt": "words",
    "damaged/plans.jsonl": "{\n",
    "damaged/result.json": "{",
    "empty/readme": "",
    "scores.safetensors": "no tensors",
}
"""Files that the commands below are given, by path."""

MISTAKES: dict[str, list[tuple[str, ...]]] = {
    "search": [
        ("--model", "llama-8bb", "--gpu", "4090"),
        ("--model", "./nowhere", "--gpu", "4090"),
        ("--model", "nowhere.gguf", "--gpu", "4090"),
        ("--model", "llama-8b", "--gpu", "40900"),
        ("--model", "llama-8b", "--gpu", "4090,h1000"),
        ("--model", "llama-8b", "--gpu", "any,4090"),
        ("--model", "llama-8b", "--gpu", "nowhere.yaml"),
        (*SERVED, "--mem", "16QB"),
        (*SERVED, "--mem", "40GB"),
        (*SERVED, "--mem", "2GB"),
        (*SERVED, "--mem", "16GB", "--weights", "bf16"),
        (*SERVED, "--context", "long"),
        (*SERVED, "--context", "900k"),
        (*SERVED, "--context", "8k-4k"),
        (*SERVED, "--generated", "few"),
        (*SERVED, "--batch", "0"),
        (*SERVED, "--weights", "int5"),
        (*SERVED, "--max-kl", "much"),
        (*SERVED, "--trials", "0"),
        (*SERVED, "--menu", "two"),
        (*SERVED, "--for", "vlm"),
        (*SERVED, "--read-bytes", "50"),
        (*SERVED, "--read-bytes", "50MB", "--moved-bytes", "50MB"),
        (*SERVED, "--tpot", "fast"),
        (*SERVED, "--ttft", "fast"),
        (*SERVED, "--sequences", "0"),
        (*SERVED, "--batch", "17", "--sequences", "30"),
        (*SERVED, "--sampler", "grid"),
        (*SERVED, "--storage", "nowhere"),
        (*SERVED, "--engine", "nowhere"),
        (*SERVED, "--engine", "processes:²"),
        (*SERVED, "--start", "nowhere.yaml"),
        (*SERVED, "--start", "misspelt.yaml"),
        (*SERVED, "--moved-bytes", "50"),
        (*SERVED, "--start", "policy.yaml"),
        (*SERVED, "--held-bytes", "50"),
        (*SERVED, "--held-bytes", "50MB"),
        (*SERVED, "--held-bytes", "50MB", "--context", "4k-8k"),
        (*SERVED, "--held-bytes", "50MB", "--jobs", "2"),
        (*SERVED, "--held-bytes", "500GB"),
        (*SERVED, "--heads", "nowhere.safetensors"),
        (*SERVED, "--heads", "scores.safetensors"),
        (*SERVED, "--text", "nowhere.txt"),
        (*SERVED, "--seed", "-1"),
        (*SERVED, "--device", "cud"),
        (*SERVED, "--run-dir", "text.txt/run"),
    ],
    "worker": [("--study", "nowhere"), ("--study", "empty"), ("--study", "text.txt")],
    "tui": [("nowhere",), ("empty",), ("damaged",)],
    "report": [("nowhere",), ("empty",), ("damaged",), ("damaged", "--out", "text.txt/page.html")],
    "card": [("nowhere",), ("empty",), ("damaged",)],
    "validate": [
        ("nowhere.yaml",),
        ("misspelt.yaml", "--model", "smollm2-135m"),
        ("policy.yaml",),
        ("policy.yaml", "--model", "smollm2-135mm"),
        ("policy.yaml", "--model", "llama-8b"),
        ("policy.yaml", "--model", "smollm2-135m", "--text", "nowhere.txt"),
        ("policy.yaml", "--model", "smollm2-135m", "--mem", "16QB"),
        ("policy.yaml", "--model", "smollm2-135m", "--workload", "large"),
        ("policy.yaml", "--model", "smollm2-135m", "--device", "cud"),
    ],
    "bench": [
        ("--model", "llama-8b"),
        ("--methods", "snapkw"),
        ("--shares", "5"),
        ("--format", "int5"),
        ("--samples", "0"),
        ("--text", "nowhere.txt"),
        ("--out", "text.txt/bench"),
        ("--device", "cud"),
    ],
    "compare": [
        ("--model", "llama-8b"),
        ("--shares", "5"),
        ("--strategies", "guess"),
        ("--seconds", "0"),
        ("--text", "nowhere.txt"),
        ("--out", "text.txt/compare"),
        ("--device", "cud"),
    ],
    "simulate": [
        ("nowhere.yaml", "--trace", "nowhere"),
        ("misspelt.yaml", "--trace", "nowhere"),
        ("policy.yaml",),
        ("policy.yaml", "--trace", "nowhere"),
        ("policy.yaml", "--trace", "empty"),
        ("policy.yaml", "--gpu", "40900", "--trace", "nowhere"),
        ("policy.yaml", "--trace", "nowhere", "--device", "cud"),
    ],
    "estimate": [
        ("--model", "llama-8bb", "--gpu", "4090"),
        ("--model", "llama-8b", "--gpu", "40900"),
        (*SERVED, "--mem", "16QB"),
        (*SERVED, "--context", "long"),
        (*SERVED, "--batch", "none"),
        (*SERVED, "--weights", "int5"),
        (*SERVED, "--policy", "snapkw"),
        (*SERVED, "--policy", "misspelt.yaml"),
        (*SERVED, "--policy", "nowhere.yaml"),
        (*SERVED, "--price-per-hour", "cheap"),
        (*SERVED, "--gpu-memory", "16"),
        (*SERVED, "--stack", "vlm"),
        (*SERVED, "--stack", "vllm", "--engine-args", "--gpu-memory-utilization 2"),
        (*SERVED, "--stack", "vllm", "--engine-version", "0.0"),
        (*SERVED, "--prefix", "some"),
        (*SERVED, "--format", "pdf"),
        (*SERVED, "--format", "csv", "--json"),
        (*SERVED, "--weights", "auto,int4"),
    ],
    "serve-sim": [
        ("--model", "llama-8bb", "--gpu", "4090", "--rate", "4"),
        ("--model", "llama-8b", "--gpu", "40900", "--rate", "4"),
        (*SERVED, "--rate", "fast"),
        (*SERVED, "--rate", "0"),
        (*SERVED, "--rate", "4", "--policy", "snapkw"),
        (*SERVED, "--rate", "4", "--prompt", "long"),
        (*SERVED, "--rate", "4", "--mem", "16QB"),
        (*SERVED, "--arrivals", "nowhere.csv"),
        (*SERVED, "--arrivals", "nowhere.csv", "--prefix", "1k"),
        (*SERVED, "--arrivals", "nowhere.csv", "--requests", "9"),
        (*SERVED, "--rate", "4", "--prefix", "4k"),
    ],
    "capture": [
        ("--model", "llama-8bb", "--out", "trace"),
        ("--model", "llama-8b", "--out", "trace"),
        ("--model", "smollm2-135m", "--out", "text.txt/trace"),
        ("--model", "smollm2-135m", "--out", "trace", "--text", "nowhere.txt"),
        ("--model", "smollm2-135m", "--out", "trace", "--probes", "0"),
        ("--model", "smollm2-135m", "--out", "trace", "--device", "cud"),
    ],
    "export": [
        ("nowhere.yaml", "--to", "vllm", "--out", "exported"),
        ("misspelt.yaml", "--to", "vllm", "--out", "exported"),
        ("policy.yaml", "--to", "vlm", "--out", "exported"),
        ("policy.yaml", "--out", "exported"),
        ("policy.yaml", "--to", "vllm", "--out", "text.txt/exported"),
        ("policy.yaml", "--to", "vllm", "--out", "exported", "--model", "llama-8bb"),
    ],
    "import-policy": [
        ("nowhere.yaml", "--from", "kvtuner", "--model", "llama-8b"),
        ("policy.yaml", "--from", "kvtunr", "--model", "llama-8b"),
        ("policy.yaml", "--from", "kvtuner", "--model", "llama-8bb"),
        ("policy.yaml", "--from", "kvtuner", "--model", "llama-8b"),
    ],
    "profile": [("--out", "text.txt/gpu"), ("--out", "mine", "--gpu", "40900")],
    "gpus": [("40900",), ("nowhere.yaml",)],
    "models": [("llama-8bb",)],
    "policies show": [("snapkw",)],
    "heads detect": [
        ("--model", "llama-8b", "--out", "found.safetensors"),
        ("--by", "guess", "--out", "found.safetensors"),
        ("--out", "text.txt/found.safetensors"),
        ("--out", "found.safetensors", "--device", "cud"),
    ],
    "heads import": [
        (name, "--score", "duo", "--model", "llama-8b", "--out", "found.safetensors")
        for name in ("nowhere.json", "text.txt", "damaged/result.json")
    ],
    "heads export": [
        ("nowhere.safetensors", "--score", "duo", "--out", "gates.tsv"),
        ("scores.safetensors", "--score", "duo", "--out", "gates.tsv"),
    ],
    "heads policy": [
        ("nowhere.safetensors", "--system", "duo", "--kv-heads", "8", "--out", "made.yaml")
    ],
    "tables pack": [("nowhere", "--out", "mine.safetensors"), ("empty", "--out", "a.safetensors")],
    "tables add": [("nowhere.safetensors",), ("text.txt",)],
}
"""What is wrong, by command; each line makes one mistake."""

CODE = """
import json, sys
from importlib.abc import MetaPathFinder

class Refuse(MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name in {heavy!r}:
            tried.append(name)
            raise ImportError(name + " is not for mistakes")

sys.meta_path.insert(0, Refuse())
from kvtune.__main__ import main
for words in {mistakes!r}:
    tried = []
    try:
        code = main(words)
    except BaseException as error:
        code = repr(error)
    print(json.dumps([" ".join(words), code, tried]))
"""
"""Makes every mistake in turn; what is heavy is refused, and noted as tried."""


def commands(group: Any, above: tuple[str, ...] = ()) -> set[str]:
    """Every command that does something, by the words that name it."""
    found: set[str] = set()
    for name, command in group.commands.items():
        path = (*above, name)
        inner = commands(command, path) if hasattr(command, "commands") else {" ".join(path)}
        found |= inner
    return found


def test_every_command_has_a_mistake_here() -> None:
    assert commands(build()) == MISTAKES.keys()


def test_mistakes_are_refused_before_anything_heavy_is_imported(tmp_path: Path) -> None:
    """In one process: what is imported for one mistake costs the next nothing."""
    for path, text in TINY.items():
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text(text)
    before = sorted(tmp_path.rglob("*"))
    mistakes = [[*name.split(), *words] for name, each in MISTAKES.items() for words in each]
    done = subprocess.run(  # noqa: S603
        [sys.executable, "-c", CODE.format(heavy=HEAVY, mistakes=mistakes)],
        cwd=tmp_path, capture_output=True, text=True, check=True,
    )  # fmt: skip
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [words.split() for words, _, _ in found] == [" ".join(m).split() for m in mistakes]
    assert [end for end in found if end[1] not in (2, 3) or end[2]] == []
    assert sorted(tmp_path.rglob("*")) == before
