"""What a bench measured: one run a line in its folder, so that it goes on where it stopped."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from kvtune.common.bounds import Loss, Name, NotNegative, Share, Whole
from kvtune.common.errors import KvtuneError
from kvtune.common.files import append_text, write_json
from kvtune.common.stored import checked, read_bytes, read_json, read_lines, whole_lines
from kvtune.policies.format import Format
from kvtune.traces.models import LoadedModel

Setting = Literal["asked after", "asked before"]
RUNS, ASKED = "runs.jsonl", "bench.json"
_AGAIN = "the file is damaged; remove the folder to measure again."


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
        read: bytes that a decode step reads, likewise; None where those are all that was taken.
    """

    policy: Name
    share: Share
    sample: Name
    kind: Name
    setting: Setting
    kl: Loss
    taken: NotNegative
    evicted: Whole
    first: tuple[Whole, Whole]
    later: tuple[Whole, Whole]
    full_first: tuple[Whole, Whole]
    full_later: tuple[Whole, Whole]
    needles: tuple[Whole, Whole]
    read: NotNegative | None = None


def open_runs(out: Path, loaded: LoadedModel, form: Format) -> list[Run]:
    """Runs that the folder already holds; begins it where it is not there.

    Raises:
        KvtuneError: it holds a bench of another model or format.
    """
    asked = {"model": loaded.fingerprint, "dtype": loaded.dtype, "format": repr(form)}
    out.mkdir(parents=True, exist_ok=True)
    if not (out / ASKED).is_file():
        write_json(out / ASKED, asked)
    if read_json(out / ASKED, _AGAIN) != asked:
        raise KvtuneError(
            "the folder holds a bench of another model or format",
            where=str(out),
            hint="choose another folder with --out, or remove this one.",
        )
    return read_runs(out)


def read_runs(out: Path) -> list[Run]:
    """The runs that a bench's folder holds; half a line at its end is cut off.

    Raises:
        KvtuneError: a line is no run.
    """
    path = out / RUNS
    if not path.is_file():
        return []
    _, half = whole_lines(read_bytes(path))  # a killed run may leave half a line
    if half:
        os.truncate(path, path.stat().st_size - len(half))
    return [checked(Run, value, where, _AGAIN) for where, value in read_lines(path, _AGAIN)]


def append_runs(out: Path, runs: Sequence[Run]) -> None:
    """Add runs to a bench's folder."""
    append_text(out / RUNS, "".join(json.dumps(asdict(run)) + "\n" for run in runs))
