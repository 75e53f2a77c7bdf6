"""Attention over packed buffers where they lie: errors and times of the formats without own pages.

    python benchmarks/packed.py --seconds 60 --out benchmarks/results/packed-h200.json
    TRITON_INTERPRET=1 python benchmarks/packed.py --device cpu --tiny --out /tmp/packed.json

One layer of 64 heads of 128 channels, 4 queries each, all in one format; by what bf16 would take.
Times are cold, in CUDA graphs, of all that a step does for these parts; beside them attention over
pages of bf16 with the same tokens, and reading the buffers back, which was the way before. Errors
are to what the format decodes to, attended to in float64.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import formats
import paged
import torch

from kvtune.common.files import write_json
from kvtune.policies.format import Format
from kvtune.policies.formats.gear import Gear
from kvtune.policies.formats.grouped import Int2, Int4
from kvtune.policies.formats.kitty import Kitty
from kvtune.policies.formats.kivi import Kivi
from kvtune.policies.formats.kvquant import KvQuant
from kvtune.policies.formats.qaq import Qaq
from kvtune.policies.formats.rotated import RotatedInt2
from kvtune.policies.formats.staircase import Staircase
from kvtune.policies.methods.full import Full
from kvtune.policies.option import ALL, Option
from kvtune.policies.paging import Growth, head_pages
from kvtune.policies.parts import HeadPart
from kvtune.policies.slabs import pool_cells
from kvtune.runtime.cache.beside import Beside, HeldPart, LaidPart
from kvtune.runtime.cache.pool import Pool

FORMATS: dict[str, Format] = {
    "kivi": Kivi(),
    "kivi4": Kivi(backbone="int4"),
    "kitty": Kitty(),
    "kvquant": KvQuant(),
    "qaq": Qaq(),
    "gear": Gear(),
    "gear, no outliers": Gear(outliers=0.0),
    "staircase": Staircase(),
    "rotated_int2, groups of 128": RotatedInt2(group=128),
    "int2, groups of 32": Int2(group=32),
    "int4, groups of 32": Int4(group=32),
}
HEAD_DIM, GROUP, ROWS = 128, 4, 64
SCALE = HEAD_DIM**-0.5


def beside(form: Format, tokens: int, rows: int, device: str, in_place: bool) -> Beside:
    """Rows that all hold the same tokens in a format, each in pages of its own."""
    generator = torch.Generator(device).manual_seed(0)
    keys, values = torch.randn(2, tokens, HEAD_DIM, device=device, generator=generator).bfloat16()
    option, every = Option(Full(), ALL, form, form), torch.arange(tokens, device=device)
    pages = head_pages(option, tokens, tokens, HEAD_DIM, Growth(1))
    pool = Pool(rows * pool_cells(pages), 4 * HEAD_DIM, device)
    held = HeldPart.of(0, HeadPart(every), (keys, values), option)
    laid = [
        LaidPart.of(HeldPart(row, held.encoded, held.formats), pool, HEAD_DIM)
        for row in range(rows)
    ]
    return Beside([], laid, HEAD_DIM, pool, in_place)


def attend(found: Beside, q: Any) -> Any:
    return found.merged(q, torch.zeros_like(q), q.new_full(q.shape[:2], -1e30), SCALE)


def error(form: Format, tokens: int, device: str) -> dict[str, float]:
    """Largest difference, as it is and over the largest output."""
    found = beside(form, tokens, 2, device, in_place=True)
    q = torch.randn(2, GROUP, HEAD_DIM, device=device)
    part = found.laid[0].fetched(found.pool)
    (keys_as, values_as), (stored_keys, stored_values) = part.formats, part.buffers
    keys, values = part.restored(
        keys_as.decode(stored_keys, HEAD_DIM, "keys"),
        values_as.decode(stored_values, HEAD_DIM, "values"),
    )
    logits = q.double() @ keys.double().T * SCALE
    exact = logits.softmax(-1) @ values.double()
    worst = float((attend(found, q) - exact).abs().max())
    return {"largest": worst, "relative": worst / float(exact.abs().max())}


def microseconds(form: Format, tokens: int, device: str) -> dict[str, float]:
    """Of all heads' attention in place, cold."""
    layers = [beside(form, tokens, ROWS, device, in_place=True)]
    size = sum(each.laid.size for each in layers[0].laid)
    for _ in range(min(paged.copies(size), 6) - 1):
        layers.append(beside(form, tokens, ROWS, device, in_place=True))
    q = torch.randn(ROWS, GROUP, HEAD_DIM, device=device)
    seconds = paged.time_s([lambda layer=layer: attend(layer, q) for layer in layers])
    return {"us": round(1e6 * seconds, 2), "mb": round(size / 1e6, 2)}


def read_back_us(form: Format, tokens: int, device: str) -> float:
    """Of the same heads where buffers are read back, the second of two times."""
    layer, q = (
        beside(form, tokens, ROWS, device, in_place=False),
        torch.randn(ROWS, GROUP, HEAD_DIM, device=device),
    )
    for _ in range(2):
        torch.cuda.synchronize()
        begun = time.perf_counter()
        attend(layer, q)
        torch.cuda.synchronize()
    return round(1e6 * (time.perf_counter() - begun), 1)


def measure(out: dict[str, Any], name: str, sizes: tuple[int, ...], arguments: Any) -> None:
    form, device = FORMATS[name], arguments.device
    row = out["formats"].setdefault(name, {"times": {}})
    row["error"] = error(form, 300 if arguments.tiny else 3000, device)
    for megabytes in () if arguments.tiny else sizes:
        tokens = int(megabytes * 1e6) // (ROWS * 4 * HEAD_DIM)
        found = microseconds(form, tokens, device)
        found["times as fast as bf16"] = round(out["bf16"][str(megabytes)]["us"] / found["us"], 2)
        if megabytes == sizes[0]:
            found["read back us"] = read_back_us(form, tokens, device)
        row["times"][str(megabytes)] = found
        torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="errors of few tokens, no times")
    parser.add_argument("--seconds", type=float, default=60, help="after which none is begun")
    parser.add_argument("--sizes", type=int, nargs="+", default=(256, 1024), help="MB of bf16")
    parser.add_argument("--only", nargs="+", default=tuple(FORMATS), help="names of formats")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    begun, sizes = time.monotonic(), tuple(arguments.sizes)
    out: dict[str, Any] = {"bf16": {}, "formats": {}, "faults": []}
    for megabytes in () if arguments.tiny else sizes:
        out["bf16"][str(megabytes)] = formats.microseconds(("bf16", "bf16"), megabytes)
    for name in arguments.only:
        if time.monotonic() - begun > arguments.seconds:
            out["faults"].append(f"no time for {name}")
            continue
        try:
            measure(out, name, sizes, arguments)
        except Exception:
            out["faults"].append(f"{name}: {traceback.format_exc()}")
        print(name, json.dumps(out["formats"].get(name)), file=sys.stderr, flush=True)
        write_json(arguments.out, out)
    out["seconds"] = round(time.monotonic() - begun, 1)
    write_json(arguments.out, out)


if __name__ == "__main__":
    main()
