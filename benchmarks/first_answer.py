"""From a clean machine to the first answer: a new environment, the install, the first command.

    python benchmarks/first_answer.py --out benchmarks/results/first-answer-cpu.json
    python benchmarks/first_answer.py --live --out benchmarks/results/first-answer-cpu.json

Runs what README says, as written, in an empty folder with a cache folder of its own; ``--live``
then also runs its second command, a search on a real model that ends in live runs. The goals: 90 s
for the first, 180 s more for the second, on two cores that do nothing else; the machine's load is
noted beside every step, and on a machine that does other things only processor seconds tell:
``first-answer-before-cpu.json`` is of an install that compiled all files, on a quiet machine.
Packages come from pip's cache where it holds them (``--no-pip-cache`` fetches them all).
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from kvtune.common.files import write_json

ROOT = Path(__file__).resolve().parent.parent
INSTALL = "install -q --no-compile -c constraints/cpu.txt ."
FIRST = "search --model llama-8b --gpu 4090 --mem 16GB"
REAL = "search --model smollm2-135m --gpu 4090 --mem 1GiB"


def step(words: list[str], folder: Path, store: Path) -> dict[str, Any]:
    """Run one command; its wall and CPU seconds, and the first lines of its answer."""
    outside = ("PYTHONPATH", "VIRTUAL_ENV", "PYTHONDONTWRITEBYTECODE", "OMP_NUM_THREADS")
    environment = {k: v for k, v in os.environ.items() if k not in outside}
    load, began, before = os.getloadavg()[0], time.perf_counter(), os.times()
    done = subprocess.run(  # noqa: S603 - the steps below, of this file alone
        words, cwd=folder, env=environment | {"KVTUNE_CACHE": str(store)}, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    after = os.times()
    cpu = sum(after[2:4]) - sum(before[2:4])
    found = {
        "command": " ".join(Path(words[0]).name if n == 0 else w for n, w in enumerate(words)),
        "wall_s": round(time.perf_counter() - began, 1),
        "cpu_s": round(cpu, 1),
        "load": [round(load, 1), round(os.getloadavg()[0], 1)],
        "exit": done.returncode,
        "answer": done.stdout.strip().splitlines()[:2],
    }
    print(found, done.stderr[-500:], file=sys.stderr, flush=True)
    return found


def copied(place: Path) -> Path:
    """The committed files alone, so that nothing built here helps."""
    git = shutil.which("git") or "git"
    listed = subprocess.run(  # noqa: S603 - git, on this repository
        [git, "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True, text=True
    ).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, place / name)
    return place


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--live", action="store_true")
    parser.add_argument("--no-pip-cache", action="store_true")
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        source, store, work = copied(place / "source"), place / "cache", place / "work"
        work.mkdir()
        scripts = place / "venv" / "bin"
        pip = [str(scripts / "pip"), *INSTALL.split()]
        pip += ["--no-cache-dir"] if asked.no_pip_cache else []
        steps = [
            step([sys.executable, "-m", "venv", "venv"], place, store),
            step(pip, source, store),
            step([str(scripts / "kvtune"), *FIRST.split()], work, store),
        ]
        if asked.live:
            steps.append(step([str(scripts / "kvtune"), *REAL.split()], work, store))
    found = {
        "first_answer_s": round(sum(s["wall_s"] for s in steps[:3]), 1),
        "real_plan_s": steps[3]["wall_s"] if asked.live else None,
        "first_answer_cpu_s": round(sum(s["cpu_s"] for s in steps[:3]), 1),
        "real_plan_cpu_s": steps[3]["cpu_s"] if asked.live else None,
        "steps": steps,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "pip_cache": not asked.no_pip_cache,
    }
    print(found)
    if asked.out:
        write_json(asked.out, found)


if __name__ == "__main__":
    main()
