"""Where a whole search spends its time: seconds by the clock and of the processor, stage by stage.

    python benchmarks/search_stages.py --workload full --device cuda --out results/stages.json

A stage is what the command's own bars name; what lies between two bars stands under the one that
follows it. The search begins with nothing captured, in a folder of its own that is removed.
``--gpu`` names the card that the plan is for, on a machine without one.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar
from unittest.mock import patch

from kvtune.common.files import write_json

T = TypeVar("T")


@dataclass
class Stages:
    """A progress that adds up what passes between its own calls."""

    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    processor_seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    at: tuple[float, float] = field(default_factory=lambda: (time.monotonic(), time.process_time()))

    def track(self, items: Iterable[T], label: str, total: int | None = None) -> Iterator[T]:
        self.passed(f"before {label}")
        yield from items
        self.passed(label)

    def note(self, message: str) -> None:
        print(message, file=sys.stderr, flush=True)

    def passed(self, label: str) -> None:
        now = time.monotonic(), time.process_time()
        self.seconds[label] += now[0] - self.at[0]
        self.processor_seconds[label] += now[1] - self.at[1]
        self.at = now
        print(f"{label}: {self.seconds[label]:.1f} s", file=sys.stderr, flush=True)

    def as_plain(self) -> dict[str, dict[str, float]]:
        return {
            name: {"seconds": round(each, 2), "processor": round(self.processor_seconds[name], 2)}
            for name, each in self.seconds.items()
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--mem", default="1GiB")
    parser.add_argument("--gpu")
    parser.add_argument("--workload", choices=("small", "full"), default="small")
    parser.add_argument("--device")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    stages = Stages()
    import kvtune

    with tempfile.TemporaryDirectory() as folder:
        # The model store is the usual one; traces and tables begin empty.
        with patch("kvtune.tuner.sources.cache_dir", lambda: Path(folder)):
            found = kvtune.search(
                arguments.model,
                arguments.gpu,
                arguments.mem,
                run_dir=Path(folder) / "run",
                workload=arguments.workload,
                device=arguments.device,
                progress=stages,
            )
        stages.passed("after all")
    seconds = sum(stages.seconds.values())
    write_json(
        arguments.out,
        {
            "model": arguments.model,
            "workload": arguments.workload,
            "machine": f"{platform.machine()}, {os.cpu_count()} cores",
            "device": found.provenance.get("device"),
            "seconds": round(seconds, 1),
            "processor_seconds": round(sum(stages.processor_seconds.values()), 1),
            "stages": stages.as_plain(),
            "loss": found.quality.kl.value,
            "share": found.share,
        },
    )
    print(f"{seconds:.1f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
