"""What a step takes to read packed buffers back, for formats that no kernel reads.

    python benchmarks/read_back.py --device cuda --seconds 40 \
        --out benchmarks/results/read-back-h200.json
    python benchmarks/read_back.py --device cpu --tiny --out /tmp/read-back.json

One layer's heads, each with its tokens in one format in the pool's pages, are read back and
attended to, as every decode step does. Of each format: seconds by heads and tokens, and the least
squares of seconds = heads x (a + bytes of a head x b).
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kvtune.common.files import write_json
from kvtune.policies.format import Format
from kvtune.policies.formats.gear import Gear
from kvtune.policies.formats.kitty import Kitty
from kvtune.policies.formats.kivi import Kivi
from kvtune.policies.formats.kvquant import KvQuant
from kvtune.policies.formats.qaq import Qaq
from kvtune.policies.methods.full import Full
from kvtune.policies.option import ALL, Option
from kvtune.policies.paging import Growth, head_pages
from kvtune.policies.parts import HeadPart
from kvtune.policies.slabs import pool_cells
from kvtune.runtime.cache.beside import Beside, HeldPart, LaidPart
from kvtune.runtime.cache.pool import Pool

FORMATS: tuple[Format, ...] = (Kivi(), Kitty(), KvQuant(), Qaq(), Gear())
GROUP = 4


def seconds_of(form: Format, heads: int, tokens: int, head_dim: int, device: str) -> dict[str, Any]:
    """The median of some steps over this many heads."""
    generator = torch.Generator(device).manual_seed(0)
    keys, values = torch.randn(2, tokens, head_dim, device=device, generator=generator)
    option, all_of = Option(Full(), ALL, form, form), torch.arange(tokens, device=device)
    pages = head_pages(option, tokens, tokens, head_dim, Growth(1))
    pool = Pool(heads * pool_cells(pages), 4 * head_dim, device)
    part = HeldPart.of(0, HeadPart(all_of), (keys.bfloat16(), values.bfloat16()), option)
    laid = [
        LaidPart.of(HeldPart(row, part.encoded, part.formats), pool, head_dim)
        for row in range(heads)
    ]
    beside = Beside([], laid, head_dim, pool)
    q = torch.randn(heads, GROUP, head_dim, device=device, generator=generator)
    none, lse = torch.zeros_like(q), q.new_full(q.shape[:2], -1e30)
    taken = []
    for _ in range(6):
        synchronise(device)
        started = time.perf_counter()
        beside.merged(q, none, lse, head_dim**-0.5)
        synchronise(device)
        taken.append(time.perf_counter() - started)
    return {
        "heads": heads, "tokens": tokens, "bytes_a_head": laid[0].laid.size,
        "seconds": float(np.median(taken[1:])),
    }  # fmt: skip


def synchronise(device: str) -> None:
    if "cuda" in device:
        torch.cuda.synchronize()


def fitted(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Seconds a head, and a byte of it."""
    heads = np.array([row["heads"] for row in rows], float)
    sizes = np.array([row["bytes_a_head"] for row in rows], float)
    taken = np.array([row["seconds"] for row in rows])
    design = np.stack([np.ones_like(sizes), sizes], 1)
    found, *_ = np.linalg.lstsq(design, taken / heads, rcond=None)
    return {"seconds_a_head": float(found[0]), "seconds_a_byte": float(found[1])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--tiny", action="store_true", help="few tokens, for a CPU")
    parser.add_argument("--seconds", type=float, default=40.0)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/read-back-h200.json"))
    arguments = parser.parse_args()
    stop = time.monotonic() + arguments.seconds
    tokens = (256, 512) if arguments.tiny else (1024, 8192, 32768)
    heads = (2,) if arguments.tiny else (8, 32)
    out: dict[str, Any] = {k: v for k, v in vars(arguments).items() if k != "out"}
    out |= {"formats": {}, "faults": []}
    for form in FORMATS:
        rows: list[dict[str, Any]] = []
        try:
            for count in heads:
                for length in tokens:
                    if time.monotonic() < stop:
                        case = form, count, length, arguments.head_dim, arguments.device
                        rows.append(seconds_of(*case))
        except Exception:
            out["faults"].append(f"{form.name}: {traceback.format_exc()}")
        if len(rows) > 1:
            out["formats"][form.name] = {"rows": rows, **fitted(rows)}
        print(form.name, json.dumps(rows), file=sys.stderr, flush=True)
        write_json(arguments.out, out)


if __name__ == "__main__":
    main()
