"""Damaged inputs for every reader, flipped bits in stored folders, killed searches.

``make torture SECONDS=120`` runs it.

Anything but an answer or a ``KvtuneError`` is a failure: another exception, more than ten seconds
of the processor's time, more than four GiB, or an answer that differs from the undisturbed one.

    python -m kvtune.benchmarks.torture --seconds 120   # as long as that, all three kinds
    python -m kvtune.benchmarks.torture --inputs 1000000 --flips 2000 --kills 100
"""

from __future__ import annotations

import argparse
import random
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kvtune.benchmarks.torture_inputs import mutated
from kvtune.benchmarks.torture_kills import kill_searches
from kvtune.benchmarks.torture_parsers import Parser, make_trace, parsers, read_layers
from kvtune.common.errors import KvtuneError
from kvtune.profiles.gpus import find_gpu
from kvtune.profiles.models import find_model
from kvtune.traces.trace import open_trace
from kvtune.tuner.explore.reader import StudyReader
from kvtune.tuner.finished import finished
from kvtune.tuner.request import SearchRequest
from kvtune.tuner.search import run_search

_HANG_S, _MEMORY = 10, 4 * 2**30


class HangError(Exception):
    """A reader took too long."""


class Failures:
    """Distinct failures, by place in the code; the first input of each is kept."""

    def __init__(self, keep: Path) -> None:
        self.keep, self.seen = keep, Counter[str]()

    def add(self, name: str, error: BaseException, data: bytes) -> None:
        frames = [
            f for f in traceback.extract_tb(error.__traceback__) if "torture" not in f.filename
        ]
        place = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "?"
        key = f"{name}: {type(error).__name__} at {place}"
        if not self.seen[key]:
            self.keep.mkdir(parents=True, exist_ok=True)
            (self.keep / f"{name}-{len(self.seen)}").write_bytes(data)
            print(f"FAILED {key}: {str(error)[:150]}", flush=True)
        self.seen[key] += 1


@contextmanager
def bounded() -> Iterator[None]:
    """An alarm against hangs; by processor time, so that a busy machine sets none off."""

    def ring(*_: object) -> None:
        raise HangError(f"more than {_HANG_S} s")

    before = signal.signal(signal.SIGPROF, ring)
    signal.setitimer(signal.ITIMER_PROF, _HANG_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def feed(name: str, parser: Parser, data: bytes, work: Path, failures: Failures) -> str:
    """One input: ``read``, ``refused`` or ``failed``."""
    try:
        with bounded():
            parser.feed(data, work)
    except KvtuneError:
        return "refused"
    except (Exception, RecursionError) as error:
        failures.add(name, error, data)
        return "failed"
    return "read"


def fuzz(known: dict[str, Parser], seed: int, count: int, until: float, work: Path,
         failures: Failures) -> dict[str, Counter[str]]:  # fmt: skip
    """So many inputs, readers by turns; fewer where time is up."""
    rng, found = random.Random(seed), {name: Counter[str]() for name in known}  # noqa: S311
    names = list(known)
    for name, parser in known.items():  # one that reads nothing would refuse whatever it is given
        if not any(feed(name, parser, seed, work, failures) == "read" for seed in parser.seeds):
            failures.add(name, ValueError("refuses every input that is as it should be"), b"")
    for number in range(count):
        if time.monotonic() > until:
            break
        name = names[number % len(names)]
        parser = known[name]
        data = mutated(rng.choice(parser.seeds), rng, parser.structured)
        found[name][feed(name, parser, data, work, failures)] += 1
    return found


def request(folder: Path) -> SearchRequest:
    """A small search."""
    shape, card = find_model("llama-8b"), find_gpu("4090")
    limit, asked = 16 * 10**9, {"trials": 4, "menu": "three", "stand_in": True}
    return SearchRequest(shape.name, shape, card, limit, folder, **asked)  # type: ignore[arg-type]


def flip_bits(seed: int, count: int, until: float, work: Path, failures: Failures) -> Counter[str]:
    """Bits of a run directory and of a trace, one at a time: refused, or nothing changes.

    Text that no figure depends on (a note, a seed in a manifest) may change unseen.
    """
    rng, found = random.Random(seed), Counter[str]()  # noqa: S311
    run, trace = work / "run", make_trace(work / "trace")
    before = _as_text(run_search(request(run)))
    files = [
        p
        for root in (run, trace)
        for p in sorted(root.rglob("*"))
        if p.is_file() and p.stat().st_size
    ]
    for _ in range(count):
        if time.monotonic() > until:
            break
        path = rng.choice(files)
        whole = path.read_bytes()
        at = rng.randrange(len(whole))
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << rng.randrange(8)]) + whole[at + 1 :])
        try:
            with bounded():
                found[_read_all(run, trace, before)] += 1
        except Exception as error:
            failures.add(f"flip {path.name}", error, path.read_bytes())
            found["failed"] += 1
        path.write_bytes(whole)
    return found


def _read_all(run: Path, trace: Path, before: str) -> str:
    try:
        StudyReader(run).read()
        read_layers(open_trace(trace))
        again = finished(request(run))
    except KvtuneError:
        return "refused"
    if again is None:
        return "made anew"
    if _as_text(again) != before:
        raise AssertionError("another answer")
    return "unchanged"


def _as_text(result: Any) -> str:
    return repr(result.as_dict())


def main() -> int:
    parse = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parse.add_argument("--seconds", type=float, default=float("inf"), help="in all; split 7:2:1")
    parse.add_argument("--inputs", type=int, default=10**9)
    parse.add_argument("--flips", type=int, default=2000)
    parse.add_argument("--kills", type=int, default=100)
    parse.add_argument("--seed", type=int, default=0)
    parse.add_argument("--only", nargs="*", default=[], help="readers to feed")
    parse.add_argument("--without", nargs="*", default=[], help="readers to leave out")
    parse.add_argument(
        "--files", type=Path, help="feed this folder's files, READER-anything, instead"
    )
    place = Path(tempfile.gettempdir()) / "kvtune-torture-failures"
    parse.add_argument("--keep", type=Path, default=place, help="where failing inputs are kept")
    asked = parse.parse_args()
    failures, now = Failures(asked.keep), time.monotonic()
    resource.setrlimit(resource.RLIMIT_AS, (_resident() + _MEMORY, resource.RLIM_INFINITY))
    with tempfile.TemporaryDirectory(prefix="kvtune-torture-") as name:
        work = Path(name)
        known = {
            n: p
            for n, p in parsers(work / "seeds").items()
            if n not in asked.without and (not asked.only or n in asked.only)
        }
        (work / "fuzz").mkdir()
        if asked.files:
            for path in sorted(asked.files.iterdir()):
                if (parser := known.get(path.name.split("-")[0])) is not None:
                    print(
                        path.name,
                        feed(path.name, parser, path.read_bytes(), work / "fuzz", failures),
                    )
            return int(bool(failures.seen))
        share = asked.seconds
        counts = fuzz(known, asked.seed, asked.inputs, now + 0.7 * share, work / "fuzz", failures)
        for reader, found in counts.items():
            print(f"{reader:<12}", ", ".join(f"{n:,} {what}" for what, n in sorted(found.items())))
        print(f"inputs       {sum(sum(found.values()) for found in counts.values()):,}", flush=True)
        flips = flip_bits(asked.seed, asked.flips, now + 0.9 * share, work, failures)
        print("flips       ", ", ".join(f"{n:,} {what}" for what, n in flips.items()), flush=True)
        kills = Counter[str]()
        if asked.kills:
            try:
                kills = kill_searches(asked.seed, asked.kills, now + share, work)
            except Exception as error:
                failures.add("kill", error, b"")
        print("kills       ", ", ".join(f"{n:,} {what}" for what, n in kills.items()), flush=True)
    print(
        f"{time.monotonic() - now:.0f} s, seed {asked.seed}: {len(failures.seen)} distinct failures"
    )
    return int(bool(failures.seen))


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


if __name__ == "__main__":
    sys.exit(main())
