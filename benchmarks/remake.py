"""Everything that the package ships and shows of measured quality, remade: run, then installed.

    python benchmarks/remake.py run FOLDER --gemma gemma-3-270m-q4_k_m.gguf --group packaged
    python benchmarks/remake.py run FOLDER --group shown
    python benchmarks/remake.py install FOLDER
    python benchmarks/pages.py --screen

``run`` starts every part of a group at once, on one GPU, each with a log beside its results, and
ends after ``--seconds``: parts write as they go, and what is there by then stays. ``packaged`` are
the tables, the baselines' curves, the recorded predictions and a second model's tables; ``shown``
what pages say beside them, some of it by the new tables. ``install`` needs no GPU: it copies what
came back where it belongs, fits the calibration, writes the hash and judges the stand-in anew. What
is missing is said, and left as it was. ``pages.py`` then writes the figures into the pages.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from recorded_parts import say

from kvtune.common.errors import KvtuneError
from kvtune.common.files import atomic, sha256
from kvtune.simulator.quality.tables_file import load_tables
from kvtune.tuner.source_models import CALIBRATION, STAND_IN

HERE = Path(__file__).parent
RESULTS = HERE / "results"
DATA = HERE.parent / "tuner" / "data"
TABLES = f"{STAND_IN}.safetensors"
LONG = "predictions-2-h200.json"
SHORT = ("predictions-short-gemma-3-270m-h200.json", "predictions-short-smollm2-h200.json")
MIDDLE = "predictions-middle-smollm2-h200.json"
SECOND = "gemma-3-270m"
MORE = {
    "levels": "predictions-levels-h200.json",
    "levels-middle": "predictions-levels-middle-smollm2-h200.json",
    "levels-short": "predictions-levels-short-smollm2-h200.json",
}
MORE_OF_SECOND = f"predictions-levels-short-{SECOND}-h200.json"
"""Predictions with twice the texts, by the size of the run."""
LIVE, REPLAYED = f"stand-in-{SECOND}.json", f"stand-in-tables-{SECOND}.json"
RULES = f"stand-in-families-{SECOND}-h200.json"
STRONGEST, PLANS = "strongest-h200.json", "strongest-plans-h200.json"
"""Plans are shown beside the baselines of quality.py too, and may have come without their own."""
COPIED = {
    "quality.json": "quality-h200.json",
    STRONGEST: STRONGEST,
    "reading-h200.json": "reading-2-h200.json",
    "task-scores-h200.json": "task-scores-h200.json",
    **{name: name for name in (LONG, MIDDLE, *SHORT, *MORE.values(), MORE_OF_SECOND, RULES)},
}
"""What parts write, and what it is called among the results."""
SHOWN = {
    "quality.json": ("baseline_curves", "at_equal_bytes", "retrieval"),
    STRONGEST: ("plans", "baselines"),
    "reading-h200.json": ("held 12 %",),
    LONG: ("plans by sample",),
    RULES: ("best",),
}
"""Parts of a result without which it shows less than the one before; one that failed is text."""


@dataclass(frozen=True)
class Part:
    """A benchmark that runs beside others.

    Args:
        name: of its log.
        words: the script and its options.
        seconds: of the group's, after which it begins nothing more, if it asks for that.
    """

    name: str
    words: tuple[str, ...]
    seconds: float | None = None


def groups(
    folder: Path, gemma: Path | None, model: str, heads: Path | None, tiny: bool
) -> dict[str, list[Part]]:
    """The parts of every group, what is needed most first."""
    small = ("--tiny",) if tiny else ()
    size = ("--size", "tiny") if tiny else ("--size", "short")
    whole, middle = (("--size", "tiny" if tiny else name) for name in ("whole", "middle"))
    crew = "2" if tiny else "6"
    scratch = str(folder / "scratch")

    def predictions(out: str, of: str, words: Sequence[str]) -> Part:
        words = ("predictions.py", "--model", of, *words, "--out", str(folder / out))
        return Part(out.removesuffix("-h200.json"), tuple(words), 0.9)

    packaged = [
        Part(
            "quality",
            ("quality.py", "--model", model, "--workers", crew, *small,
             "--scratch", f"{scratch}/quality", "--out", str(folder)),
            0.8,
        ),
        predictions(LONG, model, whole),
        predictions(SHORT[1], model, size),
        predictions(MIDDLE, model, middle),
        *(predictions(out, model, ("--size", "tiny" if tiny else each))
          for each, out in MORE.items()),
    ]  # fmt: skip
    if gemma is not None:
        named = ("--name", SECOND, "--out", str(folder / f"{SECOND}.safetensors"))
        packaged += [
            predictions(SHORT[0], str(gemma), size),
            predictions(MORE_OF_SECOND, str(gemma), ("--size", "tiny" if tiny else "levels-short")),
            Part("second-source", ("second_source.py", str(gemma), *named, "--scratch", scratch)),
            Part("stand-in", ("stand_in.py", str(gemma), "--out", str(folder / LIVE))),
            Part(
                "families",
                ("stand_in_families.py", str(gemma), *small, "--out", str(folder / RULES)),
                0.9,
            ),
        ]
    tables = folder / TABLES
    used = ("--tables", str(tables)) if tables.exists() else ()
    gates = ("--heads", str(heads)) if heads else ()
    shown = [
        Part(
            "strongest",
            ("strongest.py", "--workers", "2" if tiny else "5", *small,
             "--scratch", f"{scratch}/strongest", "--out", str(folder / "strongest-h200.json")),
            0.6,
        ),
        Part(
            "reading",
            ("reading.py", *small, *gates, "--out", str(folder / "reading-h200.json")),
            0.8,
        ),
        Part(
            "task-scores",
            ("task_scores.py", *small, *used, "--out", str(folder / "task-scores-h200.json")),
            0.9,
        ),
    ]  # fmt: skip
    return {"packaged": packaged, "shown": shown}


def run(parts: Sequence[Part], folder: Path, device: str, seconds: float) -> None:
    """Run parts side by side, and end those that outlast the time."""
    folder.mkdir(parents=True, exist_ok=True)
    until = time.monotonic() + seconds
    running: dict[str, subprocess.Popen[bytes]] = {}
    environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "2")}
    try:
        for part in parts:
            words = [sys.executable, str(HERE / part.words[0]), *part.words[1:], "--device", device]
            if part.seconds is not None:
                words += ["--seconds", str(round(part.seconds * seconds))]
            with (folder / f"{part.name}.log").open("w") as log:
                running[part.name] = subprocess.Popen(  # noqa: S603 - our own scripts
                    words, stdout=log, stderr=subprocess.STDOUT, env=environment,
                    start_new_session=True,
                )  # fmt: skip
        for name, process in running.items():
            try:
                left = max(until - time.monotonic(), 0.1)
                say(name, "ended with", process.wait(left))
            except subprocess.TimeoutExpired:
                say(name, "was ended after", f"{seconds:g} s")
    finally:
        for process in running.values():  # with the processes that they began themselves
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def install(folder: Path) -> Iterator[str]:
    """Put everything that came back where it belongs; what was done, or is missing, in words."""
    for name, kept in COPIED.items():
        if _is_whole(folder / name):
            if name == "quality.json":
                for earlier in RESULTS.glob("quality-*.json"):
                    earlier.unlink()
            shutil.copyfile(folder / name, RESULTS / kept)
            yield f"{kept}: copied"
        else:
            yield f"{kept}: MISSING or not whole, left as it was"
    if _is_whole(folder / STRONGEST, ("plans",)):
        shutil.copyfile(folder / STRONGEST, RESULTS / PLANS)
        yield f"{PLANS}: copied"
    yield _install_tables(folder / TABLES)
    yield _fit(folder)
    yield from _judge_stand_in(folder)


def _is_whole(file: Path, parts: Sequence[str] | None = None) -> bool:
    """Whether a result file is there, with some parts or with those that pages show."""
    if not file.is_file():
        return False
    found = json.loads(file.read_text(encoding="utf-8"))
    shown = SHOWN.get(file.name, ()) if parts is None else parts
    return all(isinstance(found.get(part), dict | list) for part in shown)


def _install_tables(file: Path) -> str:
    """The packaged tables and their hash, if the baselines' curves are with them."""
    if not file.is_file():
        return f"{TABLES}: MISSING, left as it was"
    tables, about = load_tables(file)
    if not all(about["baselines"].get(family) for family in ("uniform", "pyramid", "adakv")):
        return f"{TABLES}: it has no curves of the baselines, left as it was"
    with atomic(DATA / TABLES) as temporary:
        shutil.copyfile(file, temporary)
    digest = sha256(DATA / TABLES)
    (DATA / "SHA256SUMS").write_text(f"{digest}  {TABLES}\n", encoding="utf-8")
    return f"{TABLES}: {len(tables.samples)} samples, {digest}"


def _fit(folder: Path) -> str:
    """The calibration, from the runs of predictions in which every plan ran on every sample."""
    for name in (LONG, *SHORT):
        if not _all_plans_ran(folder / name):
            return f"{CALIBRATION}: MISSING plans on some samples of {name}, left as it was"
    more = [MIDDLE, *MORE.values(), MORE_OF_SECOND]  # as they came, or as they were
    others = [*SHORT, *(name for name in more if _all_plans_ran(RESULTS / name))]
    _python(
        "predictions_judged.py", LONG, "--fitted-on", *others, "--probes", "probes", "--each",
        "--out", "predictions-judged.json", "--fit", str(DATA / CALIBRATION),
    )  # fmt: skip
    alone = "predictions-judged-alone.json"
    _python("predictions_judged.py", LONG, "--probes", "probes", "--out", alone)
    _python("ranking_ways.py", "--out", "ranking-ways.json")
    return f"{CALIBRATION}: fitted; predictions-judged.json, {alone} and ranking-ways.json made"


def _all_plans_ran(file: Path) -> bool:
    """Whether a run of predictions was not ended before its plans had run on all samples."""
    if not file.is_file():
        return False
    found = json.loads(file.read_text(encoding="utf-8"))
    samples = [each for each in found.get("samples", {}).values() if each["split"] != "search"]
    return 0 < len(samples) <= len(found.get("plans by sample", {}))


def _judge_stand_in(folder: Path) -> Iterator[str]:
    """Bands and choices of the new tables and calibration, on the model that is no source."""
    live = folder / LIVE
    _python("stand_in.py", str(live if live.is_file() else RESULTS / LIVE), "--out", LIVE)
    yield f"{LIVE}: {'run anew' if live.is_file() else 'losses as before'}, bands of today"
    tables = folder / f"{SECOND}.safetensors"
    if not tables.is_file():
        yield f"{REPLAYED}: MISSING {tables.name}, left as it was"
        return
    _python("stand_in_tables.py", str(tables), "--out", REPLAYED)
    yield f"{REPLAYED}: by its new tables"


def _python(script: str, *words: str) -> None:
    """A script among the results, to its end."""
    command = [sys.executable, str(HERE / script), *words]
    done = subprocess.run(  # noqa: S603 - our own scripts
        command, cwd=RESULTS, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise KvtuneError(f"{script} failed", hint=done.stderr[-2000:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("run", "install"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--group", choices=("packaged", "shown"), default="packaged")
    parser.add_argument("--gemma", type=Path, help="weights of the second model")
    parser.add_argument("--heads", type=Path, help="head scores of gates.py, for reading.py")
    parser.add_argument("--model", default=STAND_IN)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seconds", type=float, default=540.0, help="until parts are ended")
    parser.add_argument("--tiny", action="store_true", help="every part once, small")
    arguments = parser.parse_args()
    folder = arguments.folder.resolve()
    if arguments.what == "install":
        for line in install(folder):
            say(line)
        return
    gemma, heads = (each and each.resolve() for each in (arguments.gemma, arguments.heads))
    parts = groups(folder, gemma, arguments.model, heads, arguments.tiny)[arguments.group]
    run(parts, folder, arguments.device, arguments.seconds)


if __name__ == "__main__":
    main()
