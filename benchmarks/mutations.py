"""Faults planted one at a time, and whether the tests find them.

    python benchmarks/mutations.py --jobs 2 --out benchmarks/results/mutations.json

Each fault is one exact replacement in a copy of the checkout, of the kinds that matter most here:
hooks of the contract that a driver forgets, exports that say what is not so, one format priced as
another, a solver that misses the optimum, and bytes miscounted. The copy's default tests must fail;
the files that ought to find a fault run first, and all others only if they did not.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LEFT_OUT = shutil.ignore_patterns(".git", ".venv*", "*.egg-info", ".*_cache", "kvtune-runs")


@dataclass(frozen=True)
class Mutation:
    """A fault that is planted in the source, and the tests that ought to find it.

    Args:
        kind: of the five.
        what: it breaks, in words.
        file: where.
        old: a piece of its text that is there once.
        new: what takes its place.
        guards: test files that ought to find it.
    """

    kind: str
    what: str
    file: str
    old: str
    new: str
    guards: tuple[str, ...]


# The quickest first.
CONTRACT = ("test_parts.py", "test_decode_conformance.py", "test_policies_conformance.py")
EXPORTS = ("test_exporters_conformance.py", "test_exporters.py")
PRICES = ("test_latency_runtime.py", "test_latency_measured.py", "test_simulator_cost.py")
SOLVER = ("test_tuner_allocate.py",)
BYTES = (
    "test_parts.py",
    "test_memory.py",
    "test_policies_bounds.py",
    "test_policies_conformance.py",
)

MUTATIONS = (
    Mutation(
        "contract hooks",
        "the newest token's key never reaches a decode method",
        "policies/decode.py",
        "fresh = self.fresh(state, keys, values)",
        "fresh = self.fresh(state, keys * 0, values)",
        CONTRACT,
    ),
    Mutation(
        "contract hooks",
        "log-weights of virtual entries are dropped",
        "policies/storage.py",
        "weights[at, end : end + len(part.tokens)] = part.log_weight",
        "weights[at, end : end + len(part.tokens)] = 0",
        CONTRACT,
    ),
    Mutation(
        "contract hooks",
        "a reader's selection is ignored",
        "policies/compressed.py",
        "        for reader, rows in self.readers.items():\n            read =",
        "        for reader, rows in list(self.readers.items())[:0]:\n            read =",
        CONTRACT,
    ),
    Mutation(
        "contract hooks",
        "linked layers are given their own keys",
        "policies/apply.py",
        "            read = prompt(other)\n",
        "            read = prompt(signals.layer)\n",
        CONTRACT,
    ),
    Mutation(
        "exporter truth",
        "a method that scores tokens is exported as a window",
        "policies/export/flatten.py",
        'if method.shape == "scored":',
        'if method.shape == "none":',
        EXPORTS,
    ),
    Mutation(
        "exporter truth",
        "a dropped method goes unreported",
        "policies/export/flatten.py",
        'if reach(option, context_tokens).shape != "all":',
        'if reach(option, context_tokens).shape == "window":',
        EXPORTS,
    ),
    Mutation(
        "exporter truth",
        "vLLM's scales are left out of its bytes",
        "policies/export/vllm_config.py",
        'scales = 0.0 if dtype == "fp8" else 8.0',
        "scales = 0.0 if dtype else 8.0",
        EXPORTS,
    ),
    Mutation(
        "format pricing",
        "every format is priced with bf16's kernel",
        "simulator/latency/kernels.py",
        "if row.point.number_format == number_format\n            ]",
        'if row.point.number_format == "bf16"\n            ]',
        PRICES,
    ),
    Mutation(
        "format pricing",
        "keys and values swap their formats' bytes",
        "policies/option.py",
        "zip(formats, part.stored_bytes(formats, head_dim), strict=True)",
        "zip(formats[::-1], part.stored_bytes(formats, head_dim), strict=True)",
        ("test_parts.py", *PRICES),
    ),
    Mutation(
        "solver",
        "the price is bisected the wrong way",
        "tuner/allocate.py",
        "            choice, high = tried, price\n",
        "            choice, low = tried, price\n",
        SOLVER,
    ),
    Mutation(
        "solver",
        "cross terms are subtracted",
        "tuner/exchange.py",
        "gain = gain + 2 * problem.shrinkage * np.einsum",
        "gain = gain - 2 * problem.shrinkage * np.einsum",
        SOLVER,
    ),
    Mutation(
        "solver",
        "pairs are never traded",
        "tuner/exchange.py",
        "    if together[best] >= -TOLERANCE:\n        return []",
        "    if together[best] >= -np.inf:\n        return []",
        SOLVER,
    ),
    Mutation(
        "byte accounting",
        "a group's scale is counted without its offset",
        "policies/formats/grouped.py",
        "_GROUP_BYTES = 4 ",
        "_GROUP_BYTES = 2 ",
        BYTES,
    ),
    Mutation(
        "byte accounting",
        "a reader's index is held for nothing",
        "policies/option.py",
        "found.get(Bf16(), 0) + reader.index_bytes(entries, head_dim)",
        "found.get(Bf16(), 0) + 0 * reader.index_bytes(entries, head_dim)",
        BYTES,
    ),
    Mutation(
        "byte accounting",
        "tokens left in 16 bits are counted as bytes",
        "policies/formats/grouped.py",
        "return 2 * exact * head_dim + across * row",
        "return exact * head_dim + across * row",
        BYTES,
    ),
    Mutation(
        "byte accounting",
        "log-weights take nothing",
        "policies/parts.py",
        "beside = _LOG_WEIGHT_BYTES * entries * self.weighted",
        "beside = 0 * entries * self.weighted",
        BYTES,
    ),
)


@dataclass(frozen=True)
class Found:
    """What the tests made of a fault.

    Args:
        kind: of fault.
        what: it breaks.
        caught_by: the first test that failed; empty where none did.
    """

    kind: str
    what: str
    caught_by: str


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--out", type=Path)
    parser.add_argument(
        "--guards-only", action="store_true", help="do not run all tests after them"
    )
    parser.add_argument("--only", nargs="*", default=[], help="words of the faults to plant")
    asked = parser.parse_args()
    planted = [
        each
        for each in MUTATIONS
        if not asked.only or any(word in each.what for word in asked.only)
    ]
    broken = failing_anyway(planted)
    found: list[Found] = []
    with ThreadPoolExecutor(asked.jobs) as pool:
        for one in pool.map(lambda each: judge(each, broken, asked.guards_only), planted):
            found.append(one)
            if asked.out:  # now, so that a run that is cut short leaves what it found
                write(asked.out, found, asked.guards_only)
    print(f"{sum(bool(one.caught_by) for one in found)} of {len(found)} faults caught")


def write(path: Path, found: Sequence[Found], guards_only: bool) -> None:
    caught = sum(bool(one.caught_by) for one in found)
    kept = {
        "caught": caught,
        "planted": len(found),
        "guards_only": guards_only,
        "faults": [asdict(one) for one in found],
    }
    path.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")


def failing_anyway(planted: Sequence[Mutation]) -> list[str]:
    """Tests of the guards that fail on this machine without any fault; they find nothing."""
    with copied() as checkout:
        guards = {name: None for mutation in planted for name in mutation.guards}
        failed = failures(checkout, [f"tests/{name}" for name in guards])
    for test in failed:
        print(f"fails without a fault, and is left out: {test}", file=sys.stderr, flush=True)
    return failed


def judge(mutation: Mutation, broken: list[str], guards_only: bool) -> Found:
    left_out = [word for test in broken for word in ("--deselect", test)]
    with copied() as checkout:
        plant(mutation, checkout)
        guards = [f"tests/{name}" for name in mutation.guards]
        caught = failures(checkout, ["-x", *left_out, *guards])
        if not caught and not guards_only:
            caught = failures(checkout, ["-x", *left_out])
    word = "caught" if caught else "MISSED"
    print(f"{word}  {mutation.what}: {' '.join(caught)}", file=sys.stderr, flush=True)
    return Found(mutation.kind, mutation.what, caught[0] if caught else "")


@contextmanager
def copied() -> Iterator[Path]:
    """A copy of the checkout, for as long as it is needed."""
    with tempfile.TemporaryDirectory() as folder:
        checkout = Path(folder) / "kvtune"
        shutil.copytree(ROOT, checkout, symlinks=True, ignore=LEFT_OUT)
        yield checkout


def plant(mutation: Mutation, checkout: Path) -> None:
    file = checkout / mutation.file
    text = file.read_text(encoding="utf-8")
    if text.count(mutation.old) != 1:
        raise SystemExit(
            f"{mutation.file} holds {mutation.old!r} {text.count(mutation.old)} times, not once"
        )
    file.write_text(text.replace(mutation.old, mutation.new), encoding="utf-8")


def failures(checkout: Path, wanted: list[str]) -> list[str]:
    """The tests that fail in a checkout, run in a process of its own."""
    words = [sys.executable, "-m", "pytest", "-q", "-n0", "-p", "no:cacheprovider", "-rfE", *wanted]
    found = os.environ.get("PYTHONPATH")
    places = os.pathsep.join([str(checkout.parent), *([found] if found else [])])
    done = subprocess.run(  # noqa: S603 - our own words
        words, cwd=checkout, env={**os.environ, "PYTHONPATH": places, "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    lines = (line.partition(" - ")[0].partition(" ") for line in done.stdout.splitlines())
    failed = [test for word, _, test in lines if word in ("FAILED", "ERROR")]
    if done.returncode not in (0, 1) or (done.returncode == 1 and not failed):
        raise SystemExit(f"the tests did not run:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return failed


if __name__ == "__main__":
    main()
