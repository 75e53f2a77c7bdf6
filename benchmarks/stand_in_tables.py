"""Whether the stand-in's bands and choices hold on a model that was no source, by its own tables.

    python benchmarks/second_source.py MODEL --name NAME --out NAME.safetensors
    python benchmarks/stand_in_tables.py NAME.safetensors --out benchmarks/results/FILE.json

The other model's loss under each packaged option, the same for all heads, is what replay of its own
trace says. It is compared with the band that a search without its weights would print; and what
such a search would choose at equal bytes with the best option for that model.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from kvtune.common.files import write_json
from kvtune.simulator.quality.tables import Tables, head_exchangeable
from kvtune.simulator.quality.tables_file import load_tables
from kvtune.tuner.band import band, needed_factor
from kvtune.tuner.quality import mean_over_kinds, ratio_interval
from kvtune.tuner.solver import evicts
from kvtune.tuner.source_models import all_tables, packaged_calibration, packaged_tables

ROUNDING = 1e-9  # nats/token: what replay says of a cache that loses nothing
SHARES = (0.015, 0.02, 0.03, 0.045, 0.06, 0.09, 0.12, 0.18, 0.25, 0.3)


def losses(tables: Tables, split: str | None = "evaluate") -> list[tuple[list[float], list[str]]]:
    """What each option loses on the samples of a split or on all, and their kinds of text."""
    some = tables if split is None else tables.of_split(split)
    kinds = [sample.kind for sample in some.samples]
    return [
        (some.by_sample(np.array([number])).tolist(), kinds) for number in range(len(some.options))
    ]


def bands(source: Tables, other: Tables) -> list[dict[str, Any]]:
    """Each option's band by the source, and what the other model loses."""
    curves, rows = packaged_calibration(), []
    pairs = zip(source.options, losses(source), losses(other), strict=True)
    for option, ours, theirs in pairs:
        some = evicts(option)
        found = band(*ours, curves, evicts=some)
        loss = mean_over_kinds(*theirs)
        rows.append(
            {
                "option": option.label,
                "method": option.method.name,
                "band": [found.low, found.high],
                "source": curves.mean(*ours, some),
                "loss": loss,
                "inside": bool(found.low <= loss <= found.high + ROUNDING),
                "needed factor": needed_factor(found, loss) if loss > ROUNDING else 0.0,
            }
        )
    return rows


def choices(source: Tables, other: Tables) -> list[dict[str, Any]]:
    """At equal bytes: the option that a search without weights chooses, and the best for the model.

    The best is known only afterwards and is picked on the samples that it is shown for; all samples
    of the other model count, since nothing was fitted on any.
    """
    tokens, head_dim = source.prompt_tokens, source.head_dim
    shares = source.footprints(tokens, head_dim) / (4 * head_dim * tokens)
    curves, judging = packaged_calibration(), all_tables(1, 1, head_dim, "any")[0]
    pairs = zip(source.options, losses(judging, "select"), strict=True)
    expected = [curves.mean(*ours, evicts(option)) for option, ours in pairs]
    theirs = losses(other, None)
    means = [mean_over_kinds(*each) for each in theirs]
    found = []
    for share in SHARES:
        fits = np.flatnonzero(shares <= share)
        chosen, best = (min(fits, key=lambda o: by[o]) for by in (expected, means))
        kinds = theirs[chosen][1]
        times = ratio_interval(theirs[chosen][0], theirs[best][0], kinds)
        found.append(
            {
                "share": share,
                "chosen": source.options[chosen].label,
                "best": source.options[best].label,
                "times the best's loss": round(times[0], 3),
                "interval": [round(end, 3) for end in times[1:]],
            }
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tables", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    packaged, other = packaged_tables()[0], load_tables(arguments.tables)[0]
    source = head_exchangeable(packaged, "any", 1, 1, packaged.head_dim)
    rows = bands(source, other)
    methods = sorted({row["method"] for row in rows})
    inside = {
        method: float(np.mean([row["inside"] for row in rows if row["method"] == method]))
        for method in methods
    }
    found = {
        "model": other.model,
        "prompt tokens": other.prompt_tokens,
        "inside": float(np.mean([row["inside"] for row in rows])),
        "inside by method": inside,
        "at equal bytes": choices(source, other),
        "options": rows,
    }
    write_json(arguments.out, found)
    print({name: found[name] for name in ("inside", "inside by method", "at equal bytes")})


if __name__ == "__main__":
    main()
