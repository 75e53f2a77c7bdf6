"""Searches that are killed at any moment, and started again until they end."""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from kvtune.profiles.gpus import find_gpu
from kvtune.profiles.models import shape_from_config
from kvtune.simulator.memory.plan import memory_plan

ANSWER = ("result.json", "policy.yaml", "plans.jsonl")
_CONTEXT, _LIMIT = 512, 10**10


class AnotherAnswerError(Exception):
    """A search that was killed ended with other files than one that was not."""


def searches(work: Path) -> dict[str, list[str]]:
    """The options of a search without weights, and of one on a small model's own trace."""
    packaged = ["--model", "llama-8b", "--mem", "16GB", "--stand-in"]
    return {"stand-in": packaged, "own weights": own_weights(work)}


def own_weights(work: Path) -> list[str]:
    """A search that captures, replays, solves and runs live, on a model made here."""
    folder, text = work / "tiny", work / "texts.jsonl"
    make_model(folder)
    rng = random.Random(0)  # noqa: S311
    words = ["".join(rng.choices("etaoinshrdlu", k=rng.randint(2, 9))) for _ in range(60)]
    documents = [" ".join(rng.choices(words, k=300)) for _ in range(60)]
    text.write_text("".join(json.dumps({"text": each}) + "\n" for each in documents))
    shape = shape_from_config(folder)
    budget = memory_plan(shape, find_gpu("4090"), _LIMIT, context_tokens=_CONTEXT, weights="bf16")
    limit = _LIMIT - budget.cache_bytes + 4 * shape.kv_bytes(_CONTEXT)  # four prompts fit whole
    return [
        "--model", str(folder), "--mem", f"{limit}B", "--context", str(_CONTEXT),
        "--generated", "16", "--weights", "bf16", "--trials", "8", "--device", "cpu",
        "--max-kl", "1", "--text", str(text),
    ]  # fmt: skip


def make_model(folder: Path) -> None:
    """A random Llama of three layers with a token a byte, as people have their models."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    from kvtune.tests.conftest import TINY, tiny_tokenizer

    torch.manual_seed(0)
    config = LlamaConfig(**TINY | {"max_position_embeddings": 2048})
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)


def kill_and_resume(options: Sequence[str], folder: Path, delays: Sequence[float]) -> int:
    """Start a search once a delay, kill it then, and let the last one end.

    Returns:
        How many were killed; the others had ended before.
    """
    shutil.rmtree(folder, ignore_errors=True)
    killed = 0
    for delay in delays:
        child = subprocess.Popen(command(options, folder), stderr=subprocess.PIPE)  # noqa: S603
        try:
            child.communicate(timeout=delay)
        except subprocess.TimeoutExpired:
            child.kill()
            child.communicate()
        killed += child.returncode == -signal.SIGKILL
    run_whole(options, folder)
    return killed


def run_whole(options: Sequence[str], folder: Path) -> float:
    """Run a search to its end; returns how long that took, in seconds."""
    began = time.monotonic()
    done = subprocess.run(  # noqa: S603
        command(options, folder), capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"the search ended with {done.returncode}: {done.stderr[-500:]}")
    return time.monotonic() - began


def command(options: Sequence[str], folder: Path) -> list[str]:
    """A search of this interpreter, silent."""
    place = ["--gpu", "4090", "--run-dir", str(folder), "--quiet", "--json"]
    return [sys.executable, "-c", _QUIET, "search", *options, *place]


_QUIET = (
    "import os, sys; os.dup2(os.open(os.devnull, os.O_WRONLY), 1); "
    "from kvtune.__main__ import main; sys.exit(main())"
)


def answers(folder: Path) -> list[bytes]:
    """The files of an ended search."""
    return [(folder / name).read_bytes() for name in ANSWER]


def kill_searches(seed: int, count: int, until: float, work: Path) -> Counter[str]:
    """Searches of both kinds by turns, each killed twice: they end with the undisturbed files.

    Raises:
        AnotherAnswerError: one did not.
        RuntimeError: one did not end, or not well.
    """
    rng, found = random.Random(seed), Counter[str]()  # noqa: S311
    asked = searches(work)
    whole = {name: run_whole(options, work / name) for name, options in asked.items()}
    while found["kills"] < count and time.monotonic() < until:
        for name, options in asked.items():
            delays = [rng.uniform(0, whole[name]), rng.uniform(0, whole[name])]
            found["kills"] += kill_and_resume(options, work / "killed", delays)
            if answers(work / "killed") != answers(work / name):
                raise AnotherAnswerError(f"{name}, killed after {delays} s")
            found[f"resumed alike, {name}"] += 1
    return found
