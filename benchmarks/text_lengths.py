"""How many characters a token of SmolLM2's tokenizer has, by kind and split of the samples' texts.

    python benchmarks/text_lengths.py --out benchmarks/results/text-lengths.json

Tests hold by this that every split has text for four samples of 8,192 tokens, without a tokenizer.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kvtune.common.files import write_json
from kvtune.traces import texts, workloads
from kvtune.traces.made_up_texts import MAKERS
from kvtune.traces.models import load_model
from kvtune.traces.samples import SPLITS, Kind

MODEL = "smollm2-135m"
KINDS: tuple[Kind, ...] = ("prose", "chat", "code", *texts.WRITTEN, *MAKERS)


def lengths(tokenizer: Any) -> Iterator[tuple[str, dict[str, dict[str, int]]]]:
    """Characters and tokens of all documents of a kind, split by split."""
    plan = workloads.Workload({"search": {}})
    for kind in KINDS:
        groups = {split: workloads._documents(plan, kind, split) for split in SPLITS}
        yield (
            kind,
            {
                split: _length(tokenizer, [d.text for some in each for d in some])
                for split, each in groups.items()
            },
        )


def _length(tokenizer: Any, some: list[str]) -> dict[str, int]:
    ids = tokenizer(some, add_special_tokens=False)["input_ids"]
    return {"characters": sum(map(len, some)), "tokens": sum(map(len, ids))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    found = dict(lengths(load_model(MODEL).tokenizer))
    write_json(arguments.out, {"tokenizer": MODEL, "kinds": found})


if __name__ == "__main__":
    main()
