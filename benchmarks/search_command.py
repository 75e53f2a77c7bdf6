"""What the command itself takes, first to last: ``kvtune search`` on real weights, nothing cached.

    python benchmarks/search_command.py --menu three all \\
        --out benchmarks/results/search-command-cpu.json

Each search is a process of its own, as a user would start it, with an empty store of traces and
tables beside the usual store of models. Processor seconds, of the process and its children, say
what it takes on a machine that is busy with other things; seconds by the clock stand beside them
with the machine's load. What is done is written after every search; one that lasts longer than
``--seconds`` is ended and says so.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from kvtune.common.files import cache_dir, write_json

MODEL, GPU, MEMORY = "smollm2-135m", "rtx-4090", "1GiB"


def searched(menu: str, words: list[str], seconds: float) -> dict[str, Any]:
    """One search to its end: what it answered and what it took."""
    asked = ["search", "--model", MODEL, "--gpu", GPU, "--mem", MEMORY, "--menu", menu, *words]
    before, started = _spent(), time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        environment = {**os.environ, "KVTUNE_CACHE": str(_store(Path(scratch)))}
        command = [sys.executable, "-m", "kvtune", *asked, "--run-dir", f"{scratch}/run", "--json"]
        try:
            done = subprocess.run(  # noqa: S603 - our own command
                command, env=environment, stdout=subprocess.PIPE, text=True, check=False,
                timeout=seconds,
            )  # fmt: skip
            found = _answer(done)
        except subprocess.TimeoutExpired:
            found = {"ended": False}
    return {
        "command": " ".join(["kvtune", *asked]),
        **found,
        "processor_seconds": round(_spent() - before, 1),
        "seconds": round(time.monotonic() - started, 1),
        "load_average": [round(each, 1) for each in os.getloadavg()],
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024,
    }


def _store(scratch: Path) -> Path:
    """An empty store that has the usual one's models, so that nothing is fetched."""
    models = cache_dir() / "models"
    models.mkdir(parents=True, exist_ok=True)
    (scratch / "models").symlink_to(models)
    return scratch


def _answer(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    if done.returncode:
        return {"ended": False, "exit code": done.returncode}
    said = json.loads(done.stdout)
    kept = ("quality", "share", "sequences", "context_tokens", "full_cache_sequences")
    return {"ended": True, **{name: said[name] for name in kept}}


def _spent() -> float:
    """Processor seconds of all children that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--menu", nargs="+", choices=("three", "few", "all"), default=["three"])
    parser.add_argument("--words", default="", help="more options of the command, in one string")
    parser.add_argument("--seconds", type=float, default=7200.0, help="until a search is ended")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    found: dict[str, Any] = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "threads": os.environ.get("OMP_NUM_THREADS", "all"),
        "searches": [],
    }
    for menu in arguments.menu:
        found["searches"].append(searched(menu, arguments.words.split(), arguments.seconds))
        write_json(arguments.out, found)
        print(json.dumps(found["searches"][-1]), file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
