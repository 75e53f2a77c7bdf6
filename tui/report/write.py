"""The report of a study: what goes into it, and into which files."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from kvtune.common.errors import KvtuneError
from kvtune.common.estimate import Estimate
from kvtune.common.files import atomic, write_text
from kvtune.common.progress import Progress, Silent
from kvtune.tui.memory_parts import MemoryParts
from kvtune.tui.report import drawing
from kvtune.tui.report.charts import heads_chart, kinds_chart, memory_chart
from kvtune.tui.report.emblem import emblem
from kvtune.tui.report.front_chart import front_chart
from kvtune.tui.report.hover import FRONT, front_titles, with_titles
from kvtune.tui.report.page import listed, page, pairs, picture, table, verdict
from kvtune.tui.report.tables import baselines_table, front_table, plan_table, plans_csv
from kvtune.tuner.explore.axes import BYTES, LOSS, RATE, TOKENS
from kvtune.tuner.explore.compare import HeadMap
from kvtune.tuner.explore.study import Study
from kvtune.tuner.explore.view import View
from kvtune.tuner.explore.what_if import Setting, figures_of
from kvtune.tuner.explore.why import why
from kvtune.tuner.verdict import verdict_of

Picture = tuple[str, str, drawing.Draw, float, float]  # name, caption, drawing, inches


def write_report(study: Study, folder: Path, progress: Progress | None = None) -> list[Path]:
    """Write ``report.html``, its pictures as PNG and SVG, and ``plans.csv``.

    Raises:
        KvtuneError: the study holds no plan, or the folder cannot be written.
    """
    row = study.chosen
    if row is None:
        raise KvtuneError(
            "this study holds no plan yet",
            where=str(study.folder),
            hint="wait for the search, or raise --mem.",
        )
    view = View(study, figures_of(study, Setting.asked(study.facts)), Setting.asked(study.facts))
    drawn, paths = {}, []
    titles = {
        f"front-{name}": front_titles(replace(view, x=axis, y=LOSS))
        for name, axis in (("tokens", TOKENS), ("bytes", BYTES), ("rate", RATE))
    }
    pictures = list(_pictures(view, row))
    for name, caption, draw, width, height in (progress or Silent()).track(
        pictures, "drawing", len(pictures)
    ):
        files = drawing.rendered(draw, width, height)
        paths += [_write(folder / f"{name}.{kind}", made) for kind, made in files.items()]
        small = drawing.rendered(draw, drawing.NARROW, max(0.8 * height, 2.0), ("svg",))["svg"]
        both = (drawing.inline(files["svg"], name), drawing.inline(small, f"{name}-narrow"))
        wide, narrow = (
            with_titles(svg, f"{where}-{FRONT}", titles.get(name, ()))
            for svg, where in zip(both, (name, f"{name}-narrow"), strict=True)
        )
        drawn[name] = picture(wide, narrow, caption)
    write_text(folder / "plans.csv", plans_csv(view))
    heads = emblem(_heads(view, row))
    html = page(study, heads, _first(study, drawn), _sections(view, row, drawn))
    write_text(folder / "report.html", html)
    return [folder / "report.html", folder / "plans.csv", *paths]


def _write(path: Path, content: bytes) -> Path:
    with atomic(path) as temporary:
        temporary.write_bytes(content)
    return path


def _heads(view: View, row: int) -> HeadMap:
    """What each head gets of the plan, at its context."""
    policy = view.study.policy(view.study.plans[row])
    return HeadMap.of(policy, int(view.figures.context_tokens[row]))


def _pictures(view: View, row: int) -> Iterator[Picture]:
    study = view.study
    heads = _heads(view, row)
    parts = MemoryParts(view.figures.budget(row), view.figures.estimate("memory", row))
    quality = f"quality: {study.facts.quality}"
    fits = View(study, view.figures, view.setting, TOKENS, LOSS)
    size = View(study, view.figures, view.setting, BYTES, LOSS)
    rate = View(study, view.figures, view.setting, RATE, LOSS)
    caption = f"Every point is a plan; loss on selection samples, {quality}."
    if (study.plans.kl[:, 0] <= 0).any():
        caption += " Plans without loss lie below the axis."
    yield "front-tokens", caption, front_chart(fits), 8.5, 4.6
    yield "front-bytes", caption, front_chart(size), 8.5, 4.6
    yield "front-rate", caption, front_chart(rate), 8.5, 4.6
    yield "memory", "The chosen plan's memory.", memory_chart(parts), 8.5, 1.5
    if not _same_everywhere(heads):
        high = 1.2 + 0.16 * heads.share.shape[1]
        budget, bits = (heads_chart(heads, shade) for shade in ("budget", "bits"))
        yield "heads-budget", "What each head keeps.", budget, 8.5, high
        yield "heads-bits", "How it is stored.", bits, 8.5, high
    where = _ran_where(study)
    if rows := _kinds(study, row):
        words = f"Held-out loss by kind of text, predicted{where}, {quality}."
        yield "kinds", words, kinds_chart(study.facts.kinds, rows), 8.5, 3.4
    if rows := live_kinds(study, row):
        words = f"The same, measured: the model ran live{where}."
        yield "kinds-live", words, kinds_chart(study.facts.kinds, rows), 8.5, 3.4


Losses = tuple[str, str, dict[str, Estimate]]  # name, family, loss by kind of text


def _kinds(study: Study, row: int) -> list[Losses]:
    if study.outcome is None:  # only a finished search says how far they may be off
        losses = zip(study.facts.kinds, study.plans[row].by_kind, strict=True)
        known = {kind: Estimate(x, x, x, "nats/token", "table") for kind, x in losses}
        return [("kvtune plan", "kvtune", known)]
    plan, *others = study.outcome.baselines
    found = [(other.name, other.family, other.by_kind) for other in others if other.by_kind]
    return [("kvtune plan", "kvtune", plan.by_kind), *found]


def _ran_where(study: Study) -> str:
    """Behind what is beside others, where the plan's own figures are of a stack."""
    return " in kvtune's own runtime" if study.outcome and study.outcome.on_stack else ""


def live_kinds(study: Study, row: int) -> list[Losses]:
    """Of the plan, and of those of the others that ran; none where the plan did not.

    In a search for a stack the plan's are those of the runtime that the others ran in.
    """
    outcome, live = study.outcome, study.live(study.plans[row])
    known = live.by_kind if live else {}
    if outcome and outcome.on_stack:
        known = outcome.baselines[0].live_by_kind
    if not known:
        return []
    others = outcome.baselines[1:] if outcome else ()
    ran = [("kvtune plan", "kvtune", known)]
    ran += [(other.name, other.family, other.live_by_kind) for other in others]
    return [each for each in ran if each[2]]


def _first(study: Study, drawn: dict[str, str]) -> str:
    """What is seen first: the verdict of a finished study, and the front beside the baselines."""
    found = verdict_of(study)
    told = verdict(found.sentence, found.comparison) if found else ""
    return told + drawn["front-tokens"]


def _sections(view: View, row: int, drawn: dict[str, str]) -> Iterator[tuple[str, str]]:
    study = view.study
    plan = study.plans[row]
    if study.outcome is not None:
        yield f"Beside others at equal bytes{_ran_where(study)}", table(baselines_table(study))
    yield f"The plan of trial {plan.trial}", table(plan_table(view, row)) + drawn["memory"]
    yield "Head by head", _head_by_head(_heads(view, row), drawn)
    yield "Why", listed(why(study, plan))
    yield "The front by bytes and by speed", drawn["front-bytes"] + drawn["front-rate"]
    if "kinds" in drawn:
        yield "Task by task", drawn["kinds"] + drawn.get("kinds-live", "")
    yield "Plans of the front", table(front_table(view))
    yield "Provenance", pairs(_provenance(study))


def _same_everywhere(heads: HeadMap) -> bool:
    return len({option for layer in heads.options for option in layer}) == 1


def _head_by_head(heads: HeadMap, drawn: dict[str, str]) -> str:
    """Two maps; of a plan whose heads are all alike a sentence says it all."""
    if _same_everywhere(heads):
        layers, kv_heads = heads.share.shape
        alike = heads.options[0][0].label
        return listed([f"All {kv_heads} KV heads of all {layers} layers get the same: {alike}."])
    return drawn["heads-budget"] + drawn["heads-bits"]


def _provenance(study: Study) -> dict[str, Any]:
    facts = study.facts
    known: dict[str, Any] = {
        "study": facts.study,
        "kvtune": facts.kvtune,
        "model": f"{facts.shape.name}, {facts.shape.source}",
        "gpu": facts.card.name,
        "weights": facts.weights,
        "seed": facts.seed,
        "samples": f"{facts.selection_samples} of selection, {facts.held_out_samples} held out",
    }
    found = study.outcome.provenance if study.outcome else {}
    return known | {k: v for k, v in found.items() if k not in known}
