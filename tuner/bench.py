"""The leaderboard: every registered policy at equal bytes, live, on held-out samples.

Two settings. ``asked after``: the prompt is compressed before any question is known. ``asked
before``: the first question stands at the prompt's end, where an observation window sees it; the
others are asked later, of the same compressed prompt. Every run is a line in ``runs.jsonl``, so
that an interrupted bench goes on where it stopped.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path

from kvtune.common.progress import Progress, Silent
from kvtune.policies.format import Format
from kvtune.policies.formats.bf16 import Bf16
from kvtune.policies.option import Option
from kvtune.policies.policy import Policy
from kvtune.runtime.calibrate import calibration_of
from kvtune.runtime.learn import learn_rotations
from kvtune.runtime.live import LiveRun, full_cache, run_live
from kvtune.runtime.prompts import fresh_prompt
from kvtune.traces.models import LoadedModel
from kvtune.traces.samples import Sample, by_turns
from kvtune.tuner.baselines import fill
from kvtune.tuner.bench_entries import Entry
from kvtune.tuner.bench_runs import Run, Setting, append_runs, open_runs
from kvtune.tuner.validate import union_of_needs

SHARES = (0.05, 0.10, 0.20, 0.40)
_TOGETHER = {"cpu": 6, "cuda": 20}  # policies a batch beside the full cache


def asked_before(sample: Sample) -> Sample | None:
    """The same text with its first question in the prompt; None where nothing is asked.

    The question's last token is the first observed one: its output is the answer's first token.
    """
    rows = [row for row, needle in enumerate(sample.needle_of_row) if needle >= 0]
    if not rows or rows[0] == 0:
        return None
    left = sample.observed - rows[0]
    asked = sample.needle_of_row[rows[0] :]
    return replace(sample, id=f"{sample.id}-asked", observed=left, needle_of_row=asked)


def bench(
    loaded: LoadedModel,
    samples: Sequence[Sample],
    chosen: Sequence[Entry],
    shares: Sequence[float],
    out: Path,
    *,
    form: Format | None = None,
    progress: Progress | None = None,
) -> list[Run]:
    """Run every entry at every share on every sample, and on its question-first twin.

    Args:
        loaded: the model.
        samples: held out.
        chosen: entries.
        shares: of the prompt's bf16 bytes.
        out: folder of the runs; what is there is not run again.
        form: how keys and values are stored; 16 bits unless given.
        progress: told of every sample.

    Raises:
        KvtuneError: the folder holds another bench.
    """
    form = form or Bf16()
    progress = progress or Silent()
    runs = open_runs(out, loaded, form)
    done = {(run.policy, run.share, run.sample) for run in runs}
    needs = union_of_needs([_probe(entry) for entry in chosen])
    if needs.calibration:
        calibration_of(loaded, progress)
    if needs.learned:
        learn_rotations(loaded, progress)
    settings = list(_settings(samples))
    for setting, sample in progress.track(settings, "running live", len(settings)):
        every = product(chosen, shares)
        wanted = [(e, share) for e, share in every if (e.name, share, sample.id) not in done]
        for found in _run_sample(loaded, setting, sample, wanted, form):
            append_runs(out, found)
            runs += found
    names = {entry.name for entry in chosen}
    return [run for run in runs if run.policy in names and run.share in shares]


def _settings(samples: Sequence[Sample]) -> Iterator[tuple[Setting, Sample]]:
    for sample in by_turns(samples):
        yield "asked after", sample
        if (twin := asked_before(sample)) is not None:
            yield "asked before", twin


def _probe(entry: Entry) -> Policy:
    """A policy of one head, for what the entry needs."""
    return Policy.uniform(Option(entry.method), 1, 1, allocator=entry.allocator)


def _run_sample(
    loaded: LoadedModel,
    setting: Setting,
    sample: Sample,
    wanted: Sequence[tuple[Entry, float]],
    form: Format,
) -> Iterator[list[Run]]:
    """Batches of runs; the prompt is run once."""
    geometry = loaded.geometry
    shape = (sample.prompt, geometry.layers, geometry.kv_heads, geometry.head_dim)
    full = 4 * math.prod(shape)
    filled = [
        (entry, share, policy)
        for entry, share in wanted
        if (policy := _filled(entry, int(share * full), shape, form)) is not None
    ]
    if not filled:
        return
    prompt = fresh_prompt(loaded, sample, union_of_needs([policy for *_, policy in filled]))
    uncompressed = full_cache(loaded, sample, prompt)
    together = _TOGETHER[loaded.device.split(":", 1)[0]]
    for at in range(0, len(filled), together):
        batch = filled[at : at + together]
        policies = [policy for *_, policy in batch]
        live = run_live(loaded, sample, prompt, policies, uncompressed)
        yield [
            _measured(entry, share, setting, sample, run, policy, shape)
            for (entry, share, policy), run in zip(batch, live, strict=True)
        ]


def _filled(
    entry: Entry, budget_bytes: int, shape: tuple[int, int, int, int], form: Format
) -> Policy | None:
    """The entry's policy with the largest budget that fits, to the token of a single head."""
    option = Option(entry.method, keys=form, values=form)
    return fill(option, entry.allocator, budget_bytes, *shape, reads=entry.reads_less)


def _measured(
    entry: Entry,
    share: float,
    setting: Setting,
    sample: Sample,
    run: LiveRun,
    policy: Policy,
    shape: tuple[int, int, int, int],
) -> Run:
    full = 4 * math.prod(shape)
    order = list(dict.fromkeys(needle for needle in sample.needle_of_row if needle >= 0))
    first, later = order[:1], order[1:]

    def right(correct: Sequence[bool], needles: Sequence[int]) -> tuple[int, int]:
        asked = [
            bool(hit)
            for hit, needle in zip(correct, sample.needle_of_row, strict=True)
            if needle in needles
        ]
        return sum(asked), len(asked)

    ours, theirs = run.correct.tolist(), run.full_correct.tolist()
    return Run(
        policy=entry.name,
        share=share,
        sample=sample.id,
        kind=sample.kind,
        setting=setting,
        kl=float(run.kl.mean()),
        taken=run.footprint_bytes / full,
        read=policy.read_bytes(shape[0], shape[-1]) / full if entry.reads_less else None,
        evicted=int((run.kept < sample.prompt).sum()),
        first=right(ours, first),
        later=right(ours, later),
        full_first=right(theirs, first),
        full_later=right(theirs, later),
        needles=(len(first), len(later)),
    )
