"""Writes figures of result files into the pages, so that no page says what no file holds.

    python benchmarks/pages.py            # all blocks of README.md and docs/
    python benchmarks/pages.py --screen   # README's first screen too, by running the command

A block stands between ``<!-- figures: NAME -->`` and ``<!-- end of figures -->``; what is between
them is written here and nowhere else. A test holds every block against the result files.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parent
SHARES = ("3%", "6%", "12%", "25%")
FAMILIES = {
    "uniform": "best uniform",
    "pyramid": "best pyramid",
    "adakv": "best AdaKV",
    "kvzip": "KVzip over the model",
    "expected_attention": "Expected Attention",
    "keydiff": "KeyDiff",
    "cake": "CAKE",
    "compresskv": "CompressKV",
}
KINDS = {
    "prose": "prose",
    "code": "code",
    "chat": "chat",
    "copy": "long copies",
    "recall": "key-value recall",
    "retrieval": "retrieval",
}
WITHIN = (0.8, 1.25)
RUNS = {
    "predictions-2-h200": "SmolLM2, 1,792 tokens",
    "predictions-middle-smollm2-h200": "SmolLM2, 896 tokens",
    "predictions-short-smollm2-h200": "SmolLM2, 384 tokens",
    "predictions-short-gemma-3-270m-h200": "Gemma-3-270M, 384 tokens",
}
LONG, GEMMA, SMALL = (
    "predictions-2-h200", "predictions-short-gemma-3-270m-h200", "predictions-short-smollm2-h200",
)  # fmt: skip
MEASURED = (
    "strongest-h200.json", *(f"{name}.json" for name in RUNS), "task-scores-h200.json",
    "reading-h200.json", "stand-in-gemma-3-270m.json", "stand-in-families-gemma-3-270m-h200.json",
)  # fmt: skip
Figures = dict[str, Any]
_BLOCK = re.compile(r"(<!-- figures: ([\w-]+) -->\n).*?(<!-- end of figures -->)", re.DOTALL)
_SCREEN = re.compile(r"```\n\d+ prompts? of .*?```", re.DOTALL)
_COMMAND = ("search", "--model", "llama-8b", "--gpu", "4090", "--mem", "16GB")


@cache
def result(name: str) -> Figures:
    """A result file."""
    found: Figures = json.loads((HERE / "results" / name).read_text(encoding="utf-8"))
    return found


def quality_file() -> Path:
    """The one run of quality.py that is kept."""
    (file,) = (HERE / "results").glob("quality-*.json")
    return file


def quality() -> Figures:
    """Its figures."""
    return result(quality_file().name)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def spaced(share: str) -> str:
    return share.replace("%", " %")


def interval(ends: Sequence[float], form: str = ".3g") -> str:
    return f"[{ends[0]:{form}}, {ends[1]:{form}}]"


def families() -> list[str]:
    """Families of baselines that the run of quality.py has at every share."""
    return [f for f in FAMILIES if all(f in quality()["at_equal_bytes"][s] for s in SHARES)]


def measured_on() -> str:
    """What the table of plans was measured on."""
    found = quality()
    plan, setting = found["retrieval"][0], found["setting"]
    end = setting.get("no needle in the last")
    where = "anywhere in it" if end is None else f"none in its last {end} tokens"
    return (
        f"Samples: {setting['workload']}; needles are hidden in the prompt, {where}. "
        f"{found['device']}, {setting['dtype']}, `{quality_file().name}`. The full cache gets "
        f"{100 * plan['full_digits']:.1f} % of {plan['needles_asked']} needles' digits."
    )


def samples() -> str:
    """What every file of figures about quality was measured on."""

    def row(name: str) -> Sequence[str]:
        found = result(name)
        setting = found.get("setting", found)
        size = setting.get("workload") or setting.get("samples")
        end = setting.get("no needle in the last")
        where = "anywhere in the prompt" if end is None else f"not in its last {end} tokens"
        device = found.get("device", "cuda" if "h200" in name else "cpu")
        return f"`{name}`", device.replace("NVIDIA ", ""), str(size), where

    names = [
        quality_file().name,
        *(name for name in MEASURED if (HERE / "results" / name).exists()),
    ]
    return table(("file", "on", "samples", "needles lie"), map(row, names))


def digits(share: str) -> Figures:
    """Of the plan at a share, over all held-out needles."""
    name = quality()["at_equal_bytes"][share]["plan"]["variant"]
    return next(row for row in quality()["retrieval"] if row["policy"] == name)


def shown_first() -> str:
    """README's table: the plan beside the best of every family."""

    def row(share: str) -> Sequence[str]:
        entry, needles = quality()["at_equal_bytes"][share], digits(share)
        below = f"{100 * needles['digits']:.1f} % ({needles['points_below_full']:.1f})"
        losses = [f"{entry[family]['kl']:.3g}" for family in families()]
        return spaced(share), *losses, f"**{entry['plan']['kl']:.3g}**", below

    head = "KV bytes", *(FAMILIES[f] for f in families()), "kvtune", "digits right (points below)"
    return table(head, map(row, SHARES))


def equal_bytes() -> str:
    """The plan beside every family, with intervals."""
    goals = dict(zip(SHARES, ("2.4", "4", "7.5", "6.5"), strict=True))
    simple = ("uniform", "pyramid", "adakv")

    def row(share: str) -> Sequence[str]:
        entry = quality()["at_equal_bytes"][share]
        least = min((entry[family] for family in simple), key=lambda each: float(each["kl"]))
        others = [f"{entry[f]['kl']:.3g}" for f in families()]
        plan = entry["plan"]
        return (
            spaced(share), *others, f"{entry['one option a layer']['kl']:.3g}",
            f"**{plan['kl']:.3g}** {interval(plan['kl_interval'])}", goals[share],
            f"{least['times_the_plan']:.1f} {interval(least['times_interval'], '.1f')}",
        )  # fmt: skip

    head = (
        "KV bytes", *(FAMILIES[f] for f in families()), "one option a layer", "kvtune",
        "goal: times below the best of the first three", "measured",
    )  # fmt: skip
    return table(head, map(row, SHARES))


def by_kind() -> str:
    """The least of all baselines over the plan's loss, on each kind of text."""

    def cell(share: str, kind: str) -> str:
        entry = quality()["at_equal_bytes"][share]
        least = min(entry[family]["kl_by_kind"][kind] for family in families())
        ours = entry["plan"]["kl_by_kind"][kind]
        return f"{least:.3g} / **{ours:.3g}** ({least / ours:.1f}x)"

    kinds = ("prose", "code", "retrieval")
    return table(("KV bytes", *kinds), ((spaced(s), *(cell(s, k) for k in kinds)) for s in SHARES))


def needles() -> str:
    """Digits right under the plan, paired with the full cache."""
    goals = dict(zip(SHARES, (6, 3, 3, 3), strict=True))

    def row(share: str) -> Sequence[str]:
        found, goal = digits(share), goals[share]
        missed = ": **missed**" if found["points_below_full"] > goal else ""
        below = f"{found['points_below_full']:.1f} {interval(found['points_interval'], '.1f')}"
        return spaced(share), f"{100 * found['digits']:.1f} %", below, f"{goal}{missed}"

    return table(
        ("KV bytes", "digits right", "points below the full cache", "goal"), map(row, SHARES)
    )


def ranking() -> str:
    """Rank correlation of predictions and of simpler measures with what live runs lose."""
    found = quality().get("ranking")
    if not isinstance(found, dict):
        return "This run was ended before it was measured."
    names = {
        "probes": "probes (kvtune)",
        "mass": "attention mass lost",
        "error": "relative output error",
    }
    cells = {key: found["spearman"][key].values() for key in names}
    rows = [
        (label, *(f"{value:.3f}" if value == value else "-" for value in cells[key]))
        for key, label in names.items()
    ]
    said = (
        f"\n\n{found['policies']} policies, {found['texts']} texts; live over predicted: median "
        f"{found['live_over_predicted_raw_median']:.2f} raw, "
        f"{found['live_over_predicted_median']:.2f} calibrated (10-90 %: "
        + " to ".join(f"{x:.2f}" for x in found["live_over_predicted_p10_p90"])
        + "); the goals were 0.97 and 1.0-1.3."
    )
    return table(("Spearman with live KL", "all", "eviction", "quantisation"), rows) + said


def strongest_rows(share: str, count: int) -> Iterator[Sequence[str]]:
    """Plans and the best published methods of one share, least loss first."""
    found = result("strongest-h200.json")
    names = {"with compaction": "plan with compaction", "without": "plan without"}
    ours = [(label, found["plans"][share][name]) for name, label in names.items()]
    theirs = sorted(
        ((row["policy"], row) for row in found["baselines"][share].values()),
        key=lambda pair: float(pair[1]["kl"]),
    )
    least = min(row["kl"] for _, row in ours)
    for label, row in [*ours, *theirs[:count]]:
        below = max(row["points_below_full"], 0.0)
        yield spaced(share), label, f"{row['kl']:.3g}", f"{row['kl'] / least:.1f}", f"{below:.1f}"


def strongest() -> str:
    """The five best published methods of every share beside the plans, and the goals."""
    head = "KV bytes", "", "live KL", "times the least", "digits below the full cache"
    body = table(head, (row for share in SHARES[::-1] for row in strongest_rows(share, 5)))
    goals = dict(zip(SHARES, ((2, 4.0), (2.5, 1.0), (3, 0.5), (3, 0.5)), strict=True))
    found, missed = result("strongest-h200.json"), []
    for share, (times, points) in goals.items():
        plan = found["plans"][share]["with compaction"]
        best = min(row["kl"] for row in found["baselines"][share].values())
        if best / plan["kl"] < times:
            missed.append(f"{best / plan['kl']:.1f} times at {spaced(share)}")
        if plan["points_below_full"] > points:
            missed.append(f"digits at {spaced(share)} by {plan['points_below_full'] - points:.1f}")
    asked = (
        "2, 2.5, 3 and 3 times below the best were asked, digits within 4, 1, 0.5 and 0.5 points"
    )
    return f"{body}\n\n{asked}: " + (f"**missed** {'; '.join(missed)}." if missed else "reached.")


def strongest_first() -> str:
    """README's short form: the best published method beside both plans."""

    def row(share: str) -> Sequence[str]:
        fitted, plain, best = ((r[1], r[2], r[3], r[4]) for r in strongest_rows(share, 1))
        times = float(best[1]) / float(fitted[1])
        return (
            spaced(share), f"{best[0]}: {best[1]}", plain[1],
            f"**{fitted[1]}** ({times:.1f} times lower)", f"{best[3]} / {plain[3]} / {fitted[3]}",
        )  # fmt: skip

    head = (
        "KV bytes", "best published", "kvtune", "kvtune with fitted keys",
        "digits below the full cache: best published / kvtune / fitted",
    )  # fmt: skip
    return table(head, map(row, SHARES))


def tasks() -> str:
    """Shares of answer tokens right, task by task."""
    found = result("task-scores-h200.json")
    names = (
        "plan", "uniform snapkv int4+4", "uniform h2o int4+4", "model_wide kvzip int4+4",
    )  # fmt: skip

    def cells(scores: dict[str, list[list[int]]]) -> Iterator[str]:
        for kind in found["full"]:
            right, asked = (sum(pair[n] for pair in scores[kind]) for n in (0, 1))
            yield f"{100 * right / asked:.0f}"

    rows = [
        (f"{row['share']:.0%}".replace("%", " %"), row["policy"], *cells(row["right"]))
        for name in names
        for row in found["policies"]
        if row["policy"] == name
    ]
    return table(
        ("KV bytes", "", *found["full"]), [("100 %", "full cache", *cells(found["full"])), *rows]
    )


def levels(file: str, name: str, column: str) -> str:
    """Live over predicted by kind of text, raw and calibrated, and how many intervals hold."""
    judged = result(file)[f"{name}, probes"]

    def cell(values: dict[str, float]) -> str:
        marks = (
            f"{value:.2f}" if WITHIN[0] <= value <= WITHIN[1] else f"**{value:.2f}**"
            for value in values.values()
        )
        return " / ".join(marks)

    rows, inside = [], [0, 0]
    for kind, label in KINDS.items():
        raw, fitted = (judged[kind][each] for each in ("raw", "calibrated"))
        for number, each in enumerate((raw, fitted)):
            ratios = each["live over predicted"].values()
            inside[number] += sum(WITHIN[0] <= ratio <= WITHIN[1] for ratio in ratios)
        rows.append((
            label, cell(raw["live over predicted"]), cell(fitted["live over predicted"]),
            f"{100 * fitted['within 80 % interval']:.0f} %",
        ))  # fmt: skip
    count = 4 * len(rows)
    said = f"Within 0.8 to 1.25 are {inside[0]} of {count} raw, {inside[1]} of {count} calibrated."
    return f"{table(('kind', 'raw, 3 / 6 / 12 / 25 %', column, 'within 80 %'), rows)}\n\n{said}"


def judged_runs() -> dict[str, str]:
    """Runs of predictions.py that were judged by each other, and what they are called."""
    judged = result("predictions-judged.json")
    return {name: label for name, label in RUNS.items() if f"{name}, probes" in judged}


def rounds() -> str:
    """What a search prints after live rounds over what is live, by run."""
    names = judged_runs()

    def row(name: str, label: str) -> Sequence[str]:
        found = result("predictions-judged.json")[f"{name}, probes"]["after rounds"]
        chosen = found["over kinds, chosen plan"]
        cells = [chosen[share] for share in ("3.0%", "6.0%", "12.0%", "25.0%")]
        marks = [f"{x:.2f}" if WITHIN[0] <= x <= WITHIN[1] else f"**{x:.2f}**" for x in cells]
        reach = found["80 % interval reaches, times"].values()
        holds = found["within 80 % interval"]
        kinds = [held for kind, held in holds.items() if kind in KINDS]
        by = [found[k][s] for k in KINDS for s in ("3.0%", "6.0%", "12.0%", "25.0%")]
        right = sum(WITHIN[0] <= x <= WITHIN[1] for x in by)
        chance = result("predictions-judged.json")[f"{name}, probes"]
        alone = chance["cells that would be right by their texts alone"]
        return (
            label, *marks, f"{min(reach):.2f} to {max(reach):.2f}",
            f"{100 * holds['over kinds']:.0f} %", f"{right} of {len(by)} ({alone:g})",
            f"{100 * sum(kinds) / len(kinds):.0f} %",
        )  # fmt: skip

    head = (
        "live over printed", "3 %", "6 %", "12 %", "25 %", "80 % interval, a factor of", "holds",
        "cells by kind within 0.8 to 1.25 (by their texts alone)", "holds by kind",
    )  # fmt: skip
    return table(head, (row(name, label) for name, label in names.items()))


def ranks() -> str:
    """Rank correlation with live loss on every recorded run."""
    names = judged_runs()
    rows = []
    for name, label in names.items():
        found = result("predictions-judged.json")[f"{name}, probes"].get("rank")
        if found is None:
            continue
        mixed, plans = (
            [found[f"{group} on {kind}"] for kind in KINDS] for group in ("mixed", "plans")
        )
        rows.append((
            label, f"{found['mixed']:.3f}", f"{min(mixed):.3f} to {max(mixed):.3f}",
            f"{found['mixed, answers alone, by whole samples']:.3f}",
            f"{min(plans):.3f} to {max(plans):.3f}",
        ))  # fmt: skip
    head = (
        "Spearman with live loss", "mixed policies, all kinds (0.985 asked)",
        "on single kinds (0.95)", "answers alone (0.9)", "tuned plans, single kinds",
    )  # fmt: skip
    return table(head, rows)


def ways() -> str:
    """Rank correlations of every way to predict, on every recorded run."""
    found = result("ranking-ways.json")
    rows = []
    for rows_of in ("all rows", "answer rows"):
        names = list(dict.fromkeys(name for run in found.values() for name in run[rows_of]))
        for name in names:
            cells = []
            for run in found.values():
                each = run[rows_of].get(name)
                cells.append(
                    "-" if each is None else f"{each['all']:.3f} / {each['answers left']:.3f}"
                )
            rows.append((f"{rows_of}: {name}", *cells))
    heads = [
        f"{run['run']} ({run['policies']}; {run['that leave answers']})" for run in found.values()
    ]
    return table(("Spearman, all policies / those that leave a third of the answers", *heads), rows)


def stand_in_live() -> str:
    """Options of a model that was no source, live, and their bands."""
    found = result("stand-in-gemma-3-270m.json")
    rows = [
        (row["option"], f"{row['band'][0]:.2g} to {row['band'][1]:.2g}", f"{row['live']:.2g}")
        for row in found["rows"]
    ]
    said = f"{found['inside']} of {len(rows)} lie inside."
    return f"{table(('option', 'band, nats/token', 'live'), rows)}\n\n{said}"


def stand_in_choices() -> str:
    """What a search without weights chooses, over the best of the options."""
    found = result("stand-in-tables-gemma-3-270m.json")
    rows = found["at equal bytes"]
    times = [row["times the best's loss"] for row in rows]
    cells = [f"**{each:.2f}**" if each > 1.1 else f"{each:.2f}" for each in times]
    over = sum(each > 1.1 for each in times)
    said = (
        f"By its own tables {100 * found['inside']:.0f} % of {len(found['options'])} options lie "
        f"inside their bands. **Missed in {over} of {len(rows)}**, worst {max(times):.2f} times."
        if over
        else f"All {len(rows)} are within 1.1."
    )
    heads = [f"{100 * row['share']:g} %" for row in rows]
    return f"{table(heads, [cells])}\n\n{said}"


def stand_in_families() -> str:
    """Rules that decide at run time, on a model that was no source."""
    if not (HERE / "results" / "stand-in-families-gemma-3-270m-h200.json").exists():
        return "No run is recorded yet."
    best = result("stand-in-families-gemma-3-270m-h200.json")["best"]
    names = list(dict.fromkeys(family for row in best.values() for family in row))

    def cell(row: Figures, family: str) -> str:
        if family not in row:
            return "-"
        found = row[family]
        times, ends = found["times the best uniform"], interval(found["interval"], ".2f")
        return f"{found['loss']:.3g} ({times:.2f} {ends})"

    rows = [(spaced(share), *(cell(row, name) for name in names)) for share, row in best.items()]
    labels = {**FAMILIES, "offered": "offered by the packaged tables"}
    return table(("KV bytes", *(labels[name] for name in names)), rows)


def reading() -> str:
    """Head scores' rules and readers beside the plan, at equal bytes."""
    found, rows = result("reading-h200.json"), []
    for name, part in found.items():
        if not isinstance(part, dict) or "rows" not in part:
            continue
        plan = part["rows"][0]
        for row in (row for row in part["rows"] if not row["policy"].startswith("solved")):
            kl, ends = row["kl"]["value"], row["kl"]["interval"]
            needles_ = row["needles"] and f"{100 * row['needles']['value']:.0f} %"
            taken = f"{100 * row['held']:.1f} / {100 * row['read']:.1f} %"
            times = f"{kl / plan['kl']['value']:.1f}"
            policy = row["policy"].removesuffix(", attending to the share and reading more")
            rows.append((name, policy, f"{kl:.3g} {interval(ends)}", times, needles_ or "-", taken))
    head = "", "policy", "KL", "times the plan's", "needle digits", "held / read"
    return table(head, rows)


BLOCKS: dict[str, Callable[[], str]] = {
    "measured-on": measured_on,
    "samples": samples,
    "shown-first": shown_first,
    "strongest-first": strongest_first,
    "equal-bytes": equal_bytes,
    "by-kind": by_kind,
    "needles": needles,
    "ranking": ranking,
    "strongest": strongest,
    "tasks": tasks,
    "levels-alone": lambda: levels(
        "predictions-judged-alone.json", LONG, "calibrated on other kinds"
    ),
    "levels-gemma": lambda: levels("predictions-judged.json", GEMMA, "calibrated on SmolLM2"),
    "levels-short": lambda: levels(
        "predictions-judged.json", SMALL, "calibrated on Gemma and on 1,792 tokens"
    ),
    "rounds": rounds,
    "ranks": ranks,
    "ranking-ways": ways,
    "stand-in-live": stand_in_live,
    "stand-in-choices": stand_in_choices,
    "stand-in-families": stand_in_families,
    "reading": reading,
}


def filled(text: str) -> str:
    """A page with every block as the result files have it."""
    return _BLOCK.sub(lambda found: f"{found[1]}{BLOCKS[found[2]]()}\n{found[3]}", text)


def pages() -> list[Path]:
    """Pages that may hold figures."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def screen() -> str:
    """What README's first command prints, up to its notes."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "KVTUNE_CACHE": folder, "NO_COLOR": "1"}
        done = subprocess.run(  # noqa: S603 - our own command
            [sys.executable, "-m", "kvtune", *_COMMAND],
            cwd=folder, env=environment, capture_output=True, text=True, check=True,
        )  # fmt: skip
    return done.stdout.split("\nnote:")[0].rstrip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--screen", action="store_true", help="run README's first command too")
    arguments = parser.parse_args()
    for page in pages():
        text = page.read_text(encoding="utf-8")
        new = filled(text)
        if arguments.screen and page.name == "README.md":
            new = _SCREEN.sub(lambda _: f"```\n{screen()}\n```", new, count=1)
        if new != text:
            page.write_text(new, encoding="utf-8")
            print(page.relative_to(ROOT))


if __name__ == "__main__":
    main()
