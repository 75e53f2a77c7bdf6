"""The runtime's kernels against a float64 reference, beside torch's own error; checks only.

``paged_kernels.py`` runs them first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from paged import DEVICE, WRITTEN, Layer, Run, make_layer, uniform
from torch import Tensor

from kvtune.policies.option import Option
from kvtune.policies.page_formats import PAGE
from kvtune.policies.pages import PageLayout
from kvtune.runtime.cache.paged_layer import PagedLayer
from kvtune.runtime.cache.pool import Pool
from kvtune.runtime.cache.reserving import reserve
from kvtune.runtime.cache.triton_backend import TritonBackend
from kvtune.runtime.kernels import tiles
from kvtune.runtime.kernels.appending import append_token, move_tokens
from kvtune.runtime.kernels.columns import column_sums
from kvtune.runtime.kernels.elementwise import rotate
from kvtune.runtime.kernels.launch import decode
from kvtune.runtime.kernels.pages import store_pages
from kvtune.runtime.kernels.reference import attend, read_page, write_page
from kvtune.runtime.kernels.tiles import PROGRAMS, block_costs, kind_of
from kvtune.runtime.rotation import Rotation

GROUP, HEAD_DIM, ROWS = 4, 128, 64


def relative(ours: Tensor, exact: Tensor) -> float:
    return float((ours.double() - exact).norm() / exact.norm())


def check_decode(head_dim: int, group: int, runs: list[Run], programs: int) -> dict[str, float]:
    """Errors against dequantise-then-attend in float64, of output, log-sum-exp and exported row."""
    rows = 1 + max(run.row for run in runs)
    layer = make_layer(runs, rows, group, head_dim, programs)
    q = torch.randn(rows, group, head_dim, device=DEVICE, dtype=torch.bfloat16)
    out = torch.empty(q.shape, device=DEVICE)
    lse = torch.empty(q.shape[:2], device=DEVICE)
    logits = torch.full((group, PAGE * len(layer.paged.table)), -torch.inf, device=DEVICE)
    scale = head_dim**-0.5
    exact, exact_lse = map(
        torch.stack,
        zip(*(attend(q[r].double(), *layer.dense(r), scale) for r in range(rows)), strict=True),
    )
    worst = {"max": 0.0, "frobenius": 0.0, "lse": 0.0}
    for export in (None, logits, None):  # the counters must be as they were for the next launch
        decode(q, layer.paged, layer.scratch, scale, out, lse, export)
        worst["max"] = max(worst["max"], float((out - exact).abs().max()))
        worst["frobenius"] = max(worst["frobenius"], relative(out, exact))
        worst["lse"] = max(worst["lse"], float((lse - exact_lse).abs().max()))
    worst["row"] = _exported_error(layer, q, logits, lse, scale)
    return worst


def _exported_error(layer: Layer, q: Tensor, logits: Tensor, lse: Tensor, scale: float) -> float:
    """Largest error of the attention weights of row 0's first segment."""
    run = layer.runs[0]
    ours = (logits[:, : run.tokens] - lse[0][:, None]).exp()
    keys, _ = layer.dense(0)
    weights = (q[0].double() @ keys.T * scale).softmax(-1)[:, : run.tokens]
    return float((ours - weights).abs().max())


def check_against_sdpa() -> dict[str, float]:
    """The bf16 kernel's error over SDPA's, on the same input."""
    layer = make_layer(uniform(ROWS, 2048), ROWS, GROUP, HEAD_DIM)
    q = torch.randn(ROWS, GROUP, HEAD_DIM, device=DEVICE, dtype=torch.bfloat16)
    dense = [layer.dense(row) for row in range(0, ROWS, 8)]
    keys, values = (torch.stack([pair[n] for pair in dense]) for n in (0, 1))
    exact = F.scaled_dot_product_attention(q[::8].double(), keys, values)
    theirs = F.scaled_dot_product_attention(
        q[::8, None].bfloat16().transpose(1, 2), *(x[:, None].bfloat16() for x in (keys, values)),
        enable_gqa=True,
    )  # fmt: skip
    ours = decode(q, layer.paged, layer.scratch, HEAD_DIM**-0.5)[::8]
    errors = relative(ours, exact), relative(theirs[:, :, 0], exact)
    return {"ours": errors[0], "sdpa": errors[1], "ratio": errors[0] / errors[1]}


def check_long_tiles(second: str | None = None) -> dict[str, float]:
    """Errors of a layer that is cut finer than programs run at once, so that none takes too long.

    Every second row holds the same tokens, each with a query of its own: two are read back by the
    reference for all. In the interpreter a tenth of all is enough, of fewer rows.

    Args:
        second: format of a few more tokens in each row; none unless given.

    Raises:
        AssertionError: the layer is cut as if there was no such rule, or a tile takes longer.
    """
    rows, tokens, share = (ROWS, 40_000, 1.0) if DEVICE == "cuda" else (8, 2560, 0.1)
    runs = uniform(rows, tokens, "int4") + (uniform(rows, 37, second) if second else [])
    with smaller_card(share):
        layer = make_layer(runs, rows, GROUP, HEAD_DIM)
        records = layer.paged.tiles.cpu().numpy()
        took = block_costs(records[:, 1].astype(np.int64)) * records[:, 4] / PAGE
        assert len(records) > 1.1 * PROGRAMS[kind_of(layer.paged.pairs)], "the rule was not asked"
        assert took.max() < 1.125 * tiles.LONGEST_TILE, f"a tile takes {took.max():.2f}"
    q = torch.randn(rows, GROUP, HEAD_DIM, device=DEVICE, dtype=torch.bfloat16)
    out, lse = torch.empty(q.shape, device=DEVICE), torch.empty(q.shape[:2], device=DEVICE)
    held, scale = [layer.dense(row) for row in range(WRITTEN)], HEAD_DIM**-0.5
    exact, exact_lse = map(
        torch.stack,
        zip(*(attend(q[n].double(), *held[n % WRITTEN], scale) for n in range(rows)), strict=True),
    )
    worst = {"tiles": float(len(records)), "frobenius": 0.0, "lse": 0.0}
    for _ in range(2):  # the counters must be as they were for the next launch
        decode(q, layer.paged, layer.scratch, scale, out, lse)
        worst["frobenius"] = max(worst["frobenius"], relative(out, exact))
        worst["lse"] = max(worst["lse"], float((lse - exact_lse).abs().max()))
    return worst


@contextmanager
def smaller_card(share: float) -> Iterator[None]:
    """As many programs run at once, and tiles may take so long, as this share of what they do."""
    longest, programs = tiles.LONGEST_TILE, dict(PROGRAMS)
    tiles.LONGEST_TILE *= share
    PROGRAMS.update({kind: round(share * count) for kind, count in programs.items()})
    try:
        yield
    finally:
        tiles.LONGEST_TILE = longest
        PROGRAMS.update(programs)


def check_pages(keys_as: str, values_as: str) -> dict[str, float]:
    """Bytes that differ from the reference's pages, and what they mean in the numbers."""
    keys, values = torch.randn(2, 3, 200, HEAD_DIM, device=DEVICE).bfloat16().unbind(0)
    layout = PageLayout(HEAD_DIM, keys_as, values_as)
    chosen = torch.randperm(200, device=DEVICE)[:93].sort().values.int()
    scales = torch.tensor([[5.0 / 448, 5.0 / 448]], device=DEVICE)
    firsts = range(0, len(chosen), layout.page_tokens)
    spans = [(first, min(first + layout.page_tokens, len(chosen))) for first in firsts]
    pool = torch.zeros(len(spans) * layout.page_bytes, dtype=torch.uint8, device=DEVICE)
    rows = [(1, a, b - a, n * layout.page_cells, 0) for n, (a, b) in enumerate(spans)]
    records = torch.tensor(rows)
    store_pages[(len(spans),)](
        keys, values, keys.stride(0), keys.stride(1), chosen, records.int().to(DEVICE), scales,
        pool, pool.view(torch.float16), pool.view(torch.bfloat16), pool.view(torch.float8_e4m3fn),
        HEAD_DIM, *layout.codes,
    )  # fmt: skip
    worst = {"bytes": 0.0, "value": 0.0}
    for page, (first, last) in enumerate(spans):
        at = chosen[first:last].long()
        ours = pool[page * layout.page_bytes :][: layout.page_bytes]
        exact = write_page(keys[1][at], values[1][at], layout, scales[0])
        worst["bytes"] += int((ours != exact).sum())
        for mine, theirs in zip(
            read_page(ours, layout, scales[0]), read_page(exact, layout, scales[0]), strict=True
        ):
            gap = float((mine - theirs)[: last - first].abs().max())
            worst["value"] = max(worst["value"], gap)
    return worst


def check_append_and_move() -> dict[str, bool]:
    """150 tokens appended one by one into pages of garbage; then the last take places before."""
    layout = PageLayout(HEAD_DIM)
    each = layout.pages_for(150)
    pool = torch.full((2 * each * layout.page_bytes,), 0x7F, dtype=torch.uint8, device=DEVICE)
    ints = {"dtype": torch.int32, "device": DEVICE}
    table = torch.randperm(2 * each, device=DEVICE).int() * layout.page_cells
    rows, at, lengths = (torch.tensor(x, **ints) for x in ([0, 1], [0, each], [0, 0]))
    keys, values = torch.randn(2, 150, 2, HEAD_DIM, device=DEVICE).bfloat16().unbind(0)
    where = (at, table, lengths, pool.view(torch.bfloat16))
    for key, value in zip(keys, values, strict=True):
        strides = (0, HEAD_DIM)
        append_token[(2,)](key, value, strides, strides, rows, *where, 2, HEAD_DIM)

    def holds(row: int, kept: Tensor) -> bool:
        cells = table[each * row : each * (row + 1)] * layout.cell_bytes
        raw = [pool[c : c + layout.page_bytes] for c in cells.tolist()]
        read = [read_page(page, layout, torch.ones(2)) for page in raw]
        both = [torch.cat(x)[: len(kept)] for x in zip(*read, strict=True)]
        theirs = (keys[kept, row].float(), values[kept, row].float())
        return all(torch.equal(x, y) for x, y in zip(both, theirs, strict=True))

    everything = torch.arange(150, device=DEVICE)
    appended = holds(0, everything) and holds(1, everything)
    sources = torch.arange(100, 150, **ints).expand(2, -1).contiguous()
    targets = torch.stack([torch.randperm(100, device=DEVICE)[:50] for _ in rows]).int()
    move_tokens[(100,)](rows, sources, targets, 50, at, table, where[-1], HEAD_DIM)
    kept = everything[:100].repeat(2, 1).scatter(1, targets.long(), sources.long())
    return {"appended": appended, "moved": holds(0, kept[0]) and holds(1, kept[1])}


def check_rotated() -> dict[str, bool]:
    """Keys rotated on their way into pages, beside two launches; to the bit."""
    shape = (8, 1, (GROUP + 2) * 8, HEAD_DIM)
    cos, sin = torch.randn(2, 8, 1, HEAD_DIM, device=DEVICE).bfloat16()
    layers = []
    for _ in range(2):
        layout = PageLayout(HEAD_DIM)
        cells = 64 * layout.pages_for(2 * PAGE) * layout.page_cells
        pool = Pool(cells, 4 * HEAD_DIM, DEVICE)
        pool.memory.zero_()
        layers.append(PagedLayer(0, [Option()] * 8, HEAD_DIM, 8, pool, TritonBackend()))
        layers[-1].seal(PAGE)
        reserve(layers[-1], PAGE)
    alike = True
    for _ in range(PAGE):
        joined = torch.randn(shape, device=DEVICE).bfloat16().transpose(1, 2)
        q, k, v = joined.split([GROUP * 8, 8, 8], 1)
        ours = layers[0].append_rotated(Rotation(q, k, cos, sin), v[:, :, 0])
        theirs, rotated = rotate(q, k, cos, sin)
        layers[1].append(rotated[:, :, 0], v[:, :, 0])
        alike &= torch.equal(ours, theirs)
    return {"queries": alike, "pages": torch.equal(*(layer.pool.memory for layer in layers))}


def check_columns() -> float:
    q, k = (torch.randn(h, 777, HEAD_DIM, device=DEVICE).bfloat16() for h in (8, 2))
    logits = q.double() @ k.double().repeat_interleave(4, 0).transpose(1, 2) * HEAD_DIM**-0.5
    causal = torch.ones(777, 777, dtype=torch.bool, device=DEVICE).tril()
    exact = logits.masked_fill(~causal, -torch.inf).softmax(-1).sum(1)
    return relative(column_sums(q, k, HEAD_DIM**-0.5), exact)


def cases() -> dict[str, Callable[[], Any]]:
    """Every check by its name."""
    mixed = [
        Run(0, "bf16", "bf16", 200), Run(0, "int4", "int4", 300), Run(1, "int4", "int2", 130),
        Run(1, "bf16", "bf16", 3), Run(2, "int2", "int2", 5000), Run(2, "bf16", "bf16", 0),
    ]  # fmt: skip
    eights = [Run(0, "fp8", "fp8", 77), Run(1, "int8", "int8", 1000), Run(1, "fp8", "fp8", 400)]
    by_token = [
        Run(0, "int4-token", "int4", 1000), Run(0, "int8-token", "bf16", 3),
        Run(1, "int8-token", "int8", 777), Run(2, "int2-token", "int4", 5000),
    ]  # fmt: skip
    return {
        "decode bf16": lambda: check_decode(128, 4, uniform(3, 1000), 64),
        "decode int4": lambda: check_decode(128, 4, uniform(3, 1000, "int4"), 64),
        "decode keys by token": lambda: check_decode(128, 4, by_token, 64),
        "decode keys by token, D 64": lambda: check_decode(64, 3, by_token, 8),
        "decode keys by token, D 256": lambda: check_decode(256, 2, by_token, 8),
        "decode mixed": lambda: check_decode(128, 4, mixed, 64),
        "decode 8 bits": lambda: check_decode(128, 7, eights, 64),
        "decode D 64": lambda: check_decode(64, 3, mixed, 8),
        "decode D 256": lambda: check_decode(256, 2, mixed, 8),
        "decode int4 in long rows": check_long_tiles,
        "decode int4 and bf16 in long rows": lambda: check_long_tiles("bf16"),
        "bf16 beside sdpa": check_against_sdpa,
        "pages int4 int2": lambda: check_pages("int4", "int2"),
        "pages fp8 int8": lambda: check_pages("fp8", "int8"),
        "pages int8 fp8": lambda: check_pages("int8", "fp8"),
        "pages int4-token int4": lambda: check_pages("int4-token", "int4"),
        "pages int2-token int8": lambda: check_pages("int2-token", "int8"),
        "append, move": check_append_and_move,
        "rotate, append": check_rotated,
        "column sums": check_columns,
    }
