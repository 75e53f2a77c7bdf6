"""How fast the explorer opens a large study and moves its cursor, without a terminal.

    python benchmarks/explorer.py --plans 10000 --out benchmarks/results/explorer.json

The goals: 10 000 plans open in 0.5 s, a step of the cursor takes 30 ms of CPU. Wall
time and the process's own CPU time are both given, since others may use the machine, and of
several tries the one that took least CPU time. No try finds cards that an earlier one has read.
What the explorer imports, before the first of this, is timed apart, in a Python of its own.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kvtune.common.files import write_json
from kvtune.profiles.gpus import forget_cards
from kvtune.tests.made_up import write_study
from kvtune.tui.app import Explorer
from kvtune.tuner.explore.reader import StudyReader
from kvtune.tuner.explore.what_if import Setting, figures_of

STEPS = 30


def timed(work: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    wall, cpu = time.perf_counter(), time.process_time()
    found = work()
    return found, {"wall_s": time.perf_counter() - wall, "cpu_s": time.process_time() - cpu}


async def on_screen(folder: Path, size: tuple[int, int]) -> dict[str, Any]:
    """Open, then walk along the front, each step drawn to the end."""
    forget_cards()
    wall, cpu = time.perf_counter(), time.process_time()
    app = Explorer(StudyReader(folder), interval_s=0)
    async with app.run_test(size=size) as pilot:
        while app.main.view is None:
            await pilot.pause(0.001)
        opened = {"wall_s": time.perf_counter() - wall, "cpu_s": time.process_time() - cpu}
        await pilot.press("home")
        steps = []
        for _ in range(STEPS):
            wall, cpu = time.perf_counter(), time.process_time()
            app.main.query_one("#plot-front").action_step(1)  # type: ignore[attr-defined]
            await pilot.pause()
            steps.append((time.perf_counter() - wall, time.process_time() - cpu))
    walls, cpus = zip(*steps, strict=True)
    return {
        "open": opened,
        "step": {
            "wall_median_s": statistics.median(walls),
            "wall_worst_s": max(walls),
            "cpu_median_s": statistics.median(cpus),
            "cpu_worst_s": max(cpus),
        },
    }


def imports_s() -> float:
    """Processor seconds of a Python that imports what ``kvtune tui`` does."""
    before = os.times()
    words = "import kvtune.cli.app, kvtune.tui.app, kvtune.tuner.explore.reader"
    subprocess.run([sys.executable, "-c", words], check=True)  # noqa: S603
    after = os.times()
    return sum(after[2:4]) - sum(before[2:4])


def least(tries: list[dict[str, Any]]) -> dict[str, Any]:
    """Opening and steps, each of the try in which it took least."""
    return {
        "open": min((each["open"] for each in tries), key=lambda one: one["cpu_s"]),
        "step": min((each["step"] for each in tries), key=lambda one: one["cpu_median_s"]),
        "tries": len(tries),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--plans", type=int, default=10_000)
    parser.add_argument("--tries", type=int, default=3)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = write_study(Path(place) / "run", asked.plans)
        _, parsed = timed(StudyReader(folder).read)
        StudyReader(folder).keep_columns()  # as the end of a search does
        study, read = timed(StudyReader(folder).read)
        _, what_if = timed(lambda: figures_of(study, Setting.asked(study.facts)))
        screens = {
            f"{w}x{h}": least([asyncio.run(on_screen(folder, (w, h))) for _ in range(asked.tries)])
            for w, h in ((120, 40), (80, 24))
        }
    found = {
        "plans": asked.plans,
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
        "imports_cpu_s": min(imports_s() for _ in range(asked.tries)),
        "read_lines": parsed,
        "read": read,
        "what_if": what_if,
        "screens": screens,
    }
    print(found)
    if asked.out:
        write_json(asked.out, found)


if __name__ == "__main__":
    main()
