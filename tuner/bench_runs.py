"""What a bench measured: one run a line in its folder, so that it goes on where it stopped."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from kvtune.common.errors import KvtuneError
from kvtune.policies.format import Format
from kvtune.traces.models import LoadedModel

Setting = Literal["asked after", "asked before"]
RUNS, ASKED = "runs.jsonl", "bench.json"


@dataclass(frozen=True)
class Run:
    """One policy on one sample.

    Args:
        policy: name of the entry.
        share: bytes asked for, of the prompt's bf16 bytes.
        sample: id.
        kind: of text.
        setting: when the questions are asked.
        kl: from the full cache, nats a token.
        taken: bytes counted while compressing, of the prompt's bf16 bytes.
        evicted: heads that dropped a token: proof that the policy fired.
        first: answer tokens of the first question: right, asked.
        later: of the others.
        full_first: under the full cache.
        full_later: likewise.
        needles: questions asked first, and later.
    """

    policy: str
    share: float
    sample: str
    kind: str
    setting: Setting
    kl: float
    taken: float
    evicted: int
    first: tuple[int, int]
    later: tuple[int, int]
    full_first: tuple[int, int]
    full_later: tuple[int, int]
    needles: tuple[int, int]


def open_runs(out: Path, loaded: LoadedModel, form: Format) -> list[Run]:
    """Runs that the folder already holds; begins it where it is not there.

    Raises:
        KvtuneError: it holds a bench of another model or format.
    """
    asked = {"model": loaded.fingerprint, "dtype": loaded.dtype, "format": repr(form)}
    out.mkdir(parents=True, exist_ok=True)
    if not (out / ASKED).is_file():
        (out / ASKED).write_text(json.dumps(asked, indent=1) + "\n", encoding="utf-8")
    if json.loads((out / ASKED).read_text(encoding="utf-8")) != asked:
        raise KvtuneError(
            "the folder holds a bench of another model or format",
            where=str(out),
            hint="choose another folder with --out, or remove this one.",
        )
    return read_runs(out)


def read_runs(out: Path) -> list[Run]:
    """The runs that a bench's folder holds; half a line at its end is cut off."""
    if not (out / RUNS).is_file():
        return []
    lines = (out / RUNS).read_text(encoding="utf-8").splitlines(keepends=True)
    whole = [line for line in lines if line.endswith("\n")]  # a killed run may leave half a line
    if len(whole) < len(lines):
        (out / RUNS).write_text("".join(whole), encoding="utf-8")
    return [_read(line) for line in whole]


def append_runs(out: Path, runs: Sequence[Run]) -> None:
    """Add runs to a bench's folder."""
    with (out / RUNS).open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(asdict(run)) + "\n" for run in runs)


def _read(line: str) -> Run:
    fields: dict[str, Any] = json.loads(line)
    whole: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
    return Run(**whole)
