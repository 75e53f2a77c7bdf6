"""Whether the stand-in's bands and choices hold on a model that was no source, by its own tables.

    python benchmarks/second_source.py MODEL --name NAME --out NAME.safetensors
    python benchmarks/stand_in_tables.py NAME.safetensors --out benchmarks/results/FILE.json

The other model's loss under each packaged option, the same for all heads, is what replay of its own
trace says. It is compared with the band that a search without its weights would print; and what
such a search would choose at equal bytes with the best option for that model.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kvtune.common.files import write_json
from kvtune.simulator.quality.tables import Tables, head_exchangeable
from kvtune.simulator.quality.tables_file import load_tables
from kvtune.tuner.band import band
from kvtune.tuner.quality import mean_over_kinds
from kvtune.tuner.question import evicts
from kvtune.tuner.source_models import packaged_calibration, packaged_tables

ROUNDING = 1e-9  # nats/token: what replay says of a cache that loses nothing
SHARES = (0.015, 0.03, 0.06, 0.12, 0.25, 0.3)


def losses(tables: Tables) -> list[tuple[list[float], list[str]]]:
    """What each option loses on held-out samples, and their kinds of text."""
    held_out = tables.of_split("evaluate")
    kinds = [sample.kind for sample in held_out.samples]
    return [
        (held_out.by_sample(np.array([number])).tolist(), kinds)
        for number in range(len(held_out.options))
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
            }
        )
    return rows


def choices(source: Tables, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """At equal bytes: the option that the source's losses choose, and the best for the model."""
    tokens, head_dim = source.prompt_tokens, source.head_dim
    shares = source.footprints(tokens, head_dim) / (4 * head_dim * tokens)
    found = []
    for share in SHARES:
        fits = [row for row, taken in zip(rows, shares, strict=True) if taken <= share]
        chosen, best = (min(fits, key=lambda row: row[by]) for by in ("source", "loss"))
        found.append(
            {
                "share": share,
                "chosen": chosen["option"],
                "best": best["option"],
                "times the best's loss": round(chosen["loss"] / best["loss"], 3),
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
        "at equal bytes": choices(source, rows),
        "options": rows,
    }
    write_json(arguments.out, found)
    print({name: found[name] for name in ("inside", "inside by method", "at equal bytes")})


if __name__ == "__main__":
    main()
