"""Where a whole search spends its time: seconds by the clock and of the processor, stage by stage.

    python benchmarks/search_stages.py --workload full --device cuda --gpu h200 --mem 3GiB \
        --large --out benchmarks/results/search-stages-h200.json

A stage is what the command's own bars name; what lies between two bars stands under the one that
follows it. Processor seconds are this process's own: helper processes have others. Every search
begins with nothing captured, in a folder of its own that is removed. ``--gpu`` names the card that
the plan is for, on a machine without one. ``--profile`` adds to each stage the functions that it
spent most of its Python time in, which makes it slower. ``--large`` adds a search with the small
workload on a model of 7.4 billion random weights: Llama-3.1-8B's shape with SmolLM2's vocabulary,
saved first, so that loading it counts. What is done is written after every stage; no stage is begun
after ``--seconds``. ``--menu`` names the methods, ``three`` unless it is given, so that runs can be
held against each other; it is written to the file, with what each search says of itself.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from cProfile import Profile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar
from unittest.mock import patch

from kvtune.common.files import write_json
from kvtune.profiles.models import find_model
from kvtune.profiles.shape import ModelShape

T = TypeVar("T")
SMALL_MODEL = "smollm2-135m"
LARGE_MEMORY = "24GiB"
SHOWN = 25  # functions of a stage, by their own time and by all of it
_SAMPLED_S = 0.05


class TimeUp(BaseException):
    """The run's seconds are over; no error of the search, so that nothing there catches it."""


@dataclass
class Busy:
    """How busy the GPU was, sampled beside the search; nothing where NVML is missing."""

    total: float = 0.0
    samples: int = 0

    def taken(self) -> float | None:
        """The mean share since the last asking."""
        share = self.total / self.samples if self.samples else None
        self.total, self.samples = 0.0, 0
        return share

    @contextmanager
    def sampled(self) -> Iterator[None]:
        """Samples for the block."""
        ended = threading.Event()
        ask = utilisation()

        def sample() -> None:
            while ask is not None and not ended.wait(_SAMPLED_S):
                self.total += ask()
                self.samples += 1

        thread = threading.Thread(target=sample, daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()


def utilisation() -> Callable[[], float] | None:
    """What share of the last moment the GPU ran kernels; None where nobody can say."""
    try:
        import pynvml

        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByIndex(0)
        pynvml.nvmlDeviceGetUtilizationRates(handle)
    except Exception:  # no library, no driver, no permission
        return None
    return lambda: float(pynvml.nvmlDeviceGetUtilizationRates(handle).gpu) / 100


@dataclass
class Stages:
    """A progress that adds up what passes between its own calls."""

    write: Callable[[], None]
    deadline: float
    profile: Profile | None = None
    busy: Busy = field(default_factory=Busy)
    stages: dict[str, dict[str, Any]] = field(
        default_factory=lambda: defaultdict(lambda: {"seconds": 0.0, "processor": 0.0})
    )
    at: tuple[float, float] = field(default_factory=lambda: (time.monotonic(), time.process_time()))

    def track(self, items: Iterable[T], label: str, total: int | None = None) -> Iterator[T]:
        self.passed(f"before {label}")
        for item in items:
            if time.monotonic() > self.deadline:
                self.passed(label, " (not to its end)")
                raise TimeUp
            yield item
        self.passed(label)

    def note(self, message: str) -> None:
        print(message, file=sys.stderr, flush=True)

    def begin_profile(self) -> None:
        """Watch which functions take the time from here on."""
        self.profile = Profile()
        self.profile.enable()

    def passed(self, label: str, how: str = "") -> None:
        now = time.monotonic(), time.process_time()
        stage, took = self.stages[label + how], now[0] - self.at[0]
        stage["seconds"] = round(stage["seconds"] + took, 2)
        stage["processor"] = round(stage["processor"] + now[1] - self.at[1], 2)
        if (share := self.busy.taken()) is not None:
            kept_busy = stage.get("GPU busy, seconds", 0.0)
            stage["GPU busy, seconds"] = round(kept_busy + share * took, 2)
        if self.profile is not None:
            self.profile.disable()
            stage.setdefault("functions", []).append(dearest(self.profile))
            self.begin_profile()
        self.at = now
        print(f"{label}{how}: {stage['seconds']:.1f} s", file=sys.stderr, flush=True)
        self.write()


def dearest(profile: Profile) -> list[str]:
    """The functions that took most time of their own, and those that took most with what they call:
    seconds of their own, seconds in all, calls, name.
    """  # fmt: skip
    profile.create_stats()
    rows = [
        (own, everything, calls, f"{'/'.join(Path(file).parts[-2:])}:{line} {name}")
        for (file, line, name), (_, calls, own, everything, _) in profile.stats.items()
    ]
    shown = dict.fromkeys(sorted(rows, reverse=True)[:SHOWN])
    shown |= dict.fromkeys(sorted(rows, key=lambda row: -row[1])[:SHOWN])
    return [f"{own:.2f} {total:.2f} {calls} {name}" for own, total, calls, name in shown]


def search(
    stages: Stages, case: dict[str, Any], folder: Path, profiled: bool, **asked: Any
) -> None:
    """One search; what is known of it is put into ``case``, also where it does not end."""
    import kvtune

    case["stages"] = stages.stages
    try:
        # The model store is the usual one; traces and tables begin empty.
        with patch("kvtune.tuner.sources.cache_dir", lambda: folder), stages.busy.sampled():
            if profiled:
                stages.begin_profile()
            found = kvtune.search(**asked, run_dir=folder / "run", progress=stages)
            stages.passed("after all")
        case |= {
            "ended": True,
            "device": found.provenance.get("device"),
            "loss": found.quality.kl.value,
            "share": found.share,
            "notes": list(found.notes),  # which menu was taken, and why
        }
    except TimeUp:
        case["ended"] = False
    except Exception as error:  # one search must not lose the other
        case |= {"ended": False, "failed": repr(error)[:300]}
    for unit in ("seconds", "processor"):
        case[unit] = round(sum(stage[unit] for stage in stages.stages.values()), 1)
    print(f"{case['seconds']:.1f} s, ended: {case['ended']}", file=sys.stderr, flush=True)


def saved_model(folder: Path, tiny: bool) -> Path:
    """A folder with random weights in Llama-3.1-8B's shape, SmolLM2's vocabulary and tokenizer."""
    import torch
    from mem_promise import random_model  # late: importing torch is part of the first search

    from kvtune.traces.models import load_model

    tokenizer = load_model(SMALL_MODEL).tokenizer
    shape = replace(find_model("llama-3.1-8b"), vocab_size=len(tokenizer), tied_embeddings=False)
    model = random_model(reduced(shape) if tiny else shape, context=4096, tiny=tiny)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    del model
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return folder


def reduced(shape: ModelShape) -> ModelShape:
    """Two narrow layers, to try the whole course on a CPU."""
    return replace(
        shape, layers=2, query_heads=4, kv_heads=2, head_dim=16, hidden_size=64,
        intermediate_size=64, windows=shape.windows[:2],
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=SMALL_MODEL)
    parser.add_argument("--mem", default="1GiB")
    parser.add_argument("--gpu")
    parser.add_argument("--workload", choices=("small", "full"), default="small")
    parser.add_argument("--menu", choices=("auto", "three", "few", "all"), default="three")
    parser.add_argument("--device")
    parser.add_argument("--large", action="store_true", help="search for a large model too")
    parser.add_argument("--profile", action="store_true", help="functions that take the time")
    parser.add_argument("--tiny", action="store_true", help="the large model alone, made tiny")
    parser.add_argument("--seconds", type=float, default=240.0, help="no stage is begun after")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    deadline = time.monotonic() + arguments.seconds
    found: dict[str, Any] = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "searches": [],
    }

    def run(model: str | Path, mem: str, workload: str) -> None:
        case: dict[str, Any] = {"model": Path(model).name, "workload": workload}
        case["menu"] = arguments.menu
        found["searches"].append(case)
        stages = Stages(lambda: write_json(arguments.out, found), deadline)
        with tempfile.TemporaryDirectory() as folder:
            asked = {"model": str(model), "gpu": arguments.gpu, "mem": mem, "workload": workload}
            asked |= {"menu": arguments.menu, "device": arguments.device}
            search(stages, case, Path(folder), arguments.profile, **asked)
        write_json(arguments.out, found)

    if not arguments.tiny:
        run(arguments.model, arguments.mem, arguments.workload)
    if arguments.large or arguments.tiny:
        with tempfile.TemporaryDirectory() as folder:
            model = saved_model(Path(folder) / "llama-8b-random", arguments.tiny)
            run(model, arguments.mem if arguments.tiny else LARGE_MEMORY, "small")


if __name__ == "__main__":
    main()
