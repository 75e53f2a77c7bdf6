"""The command that repeats a search, as far as its run directory says."""

from __future__ import annotations

import shlex
from dataclasses import asdict
from typing import Any

from kvtune.common.units import exact_bytes
from kvtune.tuner.config_file import read_config
from kvtune.tuner.explore.study import Study

_OPTIONS = {
    "model": "--model", "gpu": "--gpu", "weights": "--weights", "generated_tokens": "--generated",
    "sequences": "--batch", "largest_kl": "--max-kl", "trials": "--trials", "seed": "--seed",
    "workload": "--workload", "menu": "--menu", "stack": "--for",
}  # fmt: skip


def command_of(study: Study) -> str:
    """The search that made a study, as far as its ``config.json`` says; paths are shortened."""
    asked = asdict(read_config(study.folder))
    facts = study.facts
    known: dict[str, Any] = {
        "model": facts.shape.name,
        "gpu": facts.gpu,
        "seed": facts.seed,
        "trials": facts.trials,
    }
    given = known | {name: value for name, value in asked.items() if value is not None}
    words = ["kvtune", "search"]
    for name, option in _OPTIONS.items():
        if name in given:
            words += [option, _portable(str(given[name]))]
    words += ["--mem", exact_bytes(facts.memory_bytes)]
    if most_read := given.get("read_bytes"):
        words += ["--read-bytes", exact_bytes(most_read)]
    if most_moved := given.get("moved_bytes"):
        words += ["--moved-bytes", exact_bytes(most_moved)]
    if heads := given.get("heads"):
        words += ["--heads", _portable(str(heads))]
    if context := given.get("context_tokens"):
        longest = given.get("longest_context")
        words += ["--context", f"{context}-{longest}" if longest else str(context)]
    if lengths := given.get("lengths"):
        words += ["--lengths", ",".join(map(str, lengths))]
    for text in given.get("texts") or ():
        words += ["--text", _portable(str(text))]
    return shlex.join([*words, *(["--stand-in"] if given.get("stand_in") else [])])


def _portable(text: str) -> str:
    """Without the folders of this machine."""
    return text.rstrip("/").rpartition("/")[2] if text.startswith(("/", "~")) else text
