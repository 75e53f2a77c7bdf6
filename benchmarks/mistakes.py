"""Processor seconds until a mistake in what was typed is refused, one mistake a command.

    python benchmarks/mistakes.py --out benchmarks/results/mistakes-cpu.json

The goal: under 0.5 s each. A Python that imports NumPy alone is timed too, since others may use the
machine, and a processor second is worth less there. Times are the least of several rounds through
all commands; the first round also compiles what was never imported, as it does once for a user.
"""

from __future__ import annotations

import argparse
import os
import platform
import resource
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from kvtune.common.files import write_json

GPU = ("--gpu", "4090")
MISTAKES = {
    "search --model": ("search", "--model", "llama-8bb", *GPU),
    "search --gpu": ("search", "--model", "llama-8b", "--gpu", "40900"),
    "search --mem": ("search", "--model", "llama-8b", *GPU, "--mem", "16QB"),
    "search --for": ("search", "--model", "llama-8b", *GPU, "--for", "vlm"),
    "search --device": ("search", "--model", "llama-8b", *GPU, "--device", "cud"),
    "estimate --policy": ("estimate", "--model", "llama-8b", *GPU, "--policy", "snapkw"),
    "serve-sim --model": ("serve-sim", "--model", "llama-8bb", *GPU, "--rate", "4"),
    "report": ("report", "nowhere"),
    "card": ("card", "nowhere"),
    "tui": ("tui", "nowhere"),
    "validate": ("validate", "nowhere.yaml"),
    "simulate": ("simulate", "nowhere.yaml", "--trace", "nowhere"),
    "export": ("export", "nowhere.yaml", "--to", "vllm", "--out", "exported"),
    "bench --methods": ("bench", "--methods", "snapkw"),
    "compare --shares": ("compare", "--shares", "5"),
    "capture --model": ("capture", "--model", "llama-8bb", "--out", "trace"),
    "profile --out": ("profile", "--out", "/dev/null/gpu"),
    "policies show": ("policies", "show", "snapkw"),
    "heads detect --model": ("heads", "detect", "--model", "llama-8bb", "--out", "heads"),
    "tables add": ("tables", "add", "nowhere.safetensors"),
}


def processor_s(words: Sequence[str], folder: str, code: int) -> float:
    """User and system seconds of a Python that is given these words."""
    keeps = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(  # noqa: S603 - the commands above
        [sys.executable, *words], cwd=folder, env=keeps, capture_output=True, check=False
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == code, done.stderr.decode()
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tries", type=int, default=5)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    commands = {"numpy": (("-c", "import numpy"), 0)} | {
        name: (("-m", "kvtune", *words), 2) for name, words in MISTAKES.items()
    }
    found = dict.fromkeys(commands, float("inf"))
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(asked.tries):
            for name, (words, code) in commands.items():
                found[name] = min(found[name], processor_s(words, folder, code))
    for name, seconds in found.items():
        print(f"{seconds:.2f} s  {name}", file=sys.stderr)
    numpy = found.pop("numpy")
    whole = {
        "processor_s": found,
        "python_with_numpy_s": numpy,
        "worst_s": max(found.values()),
        "within_half_a_second": sum(seconds < 0.5 for seconds in found.values()),
        "tries": asked.tries,
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
    }
    if asked.out:
        write_json(asked.out, whole)


if __name__ == "__main__":
    main()
