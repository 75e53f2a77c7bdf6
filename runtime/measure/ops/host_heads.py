"""What a layer whose heads lie in host memory does at a step: choose, bring over, and join.

The parts are timed one by one on a layer of random tokens that the runtime itself has filled.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from kvtune.policies.methods.quest import Quest
from kvtune.policies.option import Budget, Option
from kvtune.policies.page_formats import PAGE
from kvtune.policies.pages import PageLayout
from kvtune.policies.policy import Policy
from kvtune.profiles.kernel_table import Point
from kvtune.runtime.cache.backend import Fetching
from kvtune.runtime.cache.host_pool import HostPool
from kvtune.runtime.cache.host_rows import HostRows
from kvtune.runtime.cache.paged_layer import PagedLayer
from kvtune.runtime.cache.which_backend import backend_for
from kvtune.runtime.kernels.launch import Scratch
from kvtune.runtime.measure.filled import filled
from kvtune.runtime.measure.grid import Grid
from kvtune.runtime.measure.operation import Operation, Setting, Wanted, Work
from kvtune.runtime.measure.plain_model import random_tensor

TOKENS_READ = 2048
"""Of each head, by the step whose choice is timed."""

HELD_TOKENS = (8192, 131072)
"""Of each head, among which the step chooses."""

LANDED_TOKENS = (512, 2048, 8192)
LANDED_AMONG = 16384
"""Tokens of a head of which so many have come over, where joining them is timed."""

_BLOCKS = (8, 32, 128, 512, 2048)
_HELD_BLOCKS = 4096  # on the host, among which the fetched ones lie at random


def _choose_points(grid: Grid) -> Iterator[Wanted]:
    for length in HELD_TOKENS if _measurable() else ():
        yield Wanted(2, _point("host_choose", grid, length, TOKENS_READ))


def _fetch_points(grid: Grid) -> Iterator[Wanted]:
    layout = PageLayout(grid.heads[0][2])
    for blocks in _BLOCKS if _measurable() else ():
        yield Wanted(
            2,
            Point(
                "host_fetch", "kvtune", head_dim=layout.head_dim,
                width_in=blocks * layout.block_bytes,
            ),
        )  # fmt: skip


def _join_points(grid: Grid) -> Iterator[Wanted]:
    for tokens in LANDED_TOKENS if _measurable() else ():
        yield Wanted(2, _point("host_join", grid, tokens, LANDED_AMONG))


def _measurable() -> bool:
    """Whether there are a GPU and Triton; without them there is no kernel to be timed."""
    return torch.cuda.is_available() and importlib.util.find_spec("triton") is not None


def _point(op: str, grid: Grid, length: int, rows: int) -> Point:
    queries, kv_heads, width = grid.heads[0]
    return Point(
        op, "kvtune", query_heads=queries, kv_heads=kv_heads, head_dim=width,
        length=length, rows=rows,
    )  # fmt: skip


def _prepare_choose(point: Point, setting: Setting) -> Work:
    """Bounds of all blocks under a new query, the best of them, and where those lie."""
    _, host, query = _layer(point, point.length, point.rows, setting)
    arrival = host.arrivals[0]
    return Work([lambda: arrival.choose(query)], arrival.indexed.index.nbytes)


def _prepare_fetch(point: Point, setting: Setting) -> Work:
    """Blocks at random places of pinned memory into the pool, by the runtime's own kernel."""
    layout, device = PageLayout(point.head_dim), torch.device(setting.device)
    count = point.width_in // layout.block_bytes
    host, backend = HostPool(device), backend_for(device)
    places = torch.from_numpy(host.take(max(_HELD_BLOCKS, count), layout.block_bytes))
    _ = host.addresses  # made now: a captured graph could not
    pool = torch.zeros(count * layout.block_bytes, dtype=torch.uint8, device=device)
    cells = layout.block_cells * torch.arange(count, dtype=torch.int32, device=device)
    generator = torch.Generator().manual_seed(0)
    drawn = places[torch.randperm(len(places), generator=generator)[:count]].to(device)
    fetching = Fetching(drawn, cells, layout)
    return Work([lambda: backend.fetch(pool, host, fetching)], point.width_in, most_calls=32)


def _prepare_join(point: Point, setting: Setting) -> Work:
    """Attention over what came, joined to that over what lies on the device."""
    layer, host, query = _layer(point, point.rows, point.length, setting)
    scale = point.head_dim**-0.5
    host.begin(query)
    if host.stream is not None:
        torch.cuda.current_stream().wait_stream(host.stream)
        host.stream = None  # all on one stream from here on: a side stream is not in the graph
    near = query.clone(), query.new_zeros(query.shape[:2], dtype=torch.float32)
    scratch = Scratch(layer.rows, layer.slots, query.shape[1], point.head_dim, query.device)
    read = 4 * layer.rows * point.length * point.head_dim
    return Work([lambda: host.finish(query, near, scratch, scale)], read)


def _layer(
    point: Point, held: int, read: int, setting: Setting
) -> tuple[PagedLayer, HostRows, Tensor]:
    """A layer that reads so many of so many tokens of each head, and a query for each row."""
    option = Option(Quest(block=PAGE), Budget(tokens=read), tier="host")
    policy = Policy.uniform(option, 1, point.kv_heads)
    cache = filled(_one_layer(point, held, setting), policy, held, 1, new_tokens=PAGE)
    group = point.query_heads // point.kv_heads
    query = random_tensor(point.kv_heads, group, point.head_dim, device=setting.device, scale=1.0)
    layer = cache.layers[0].paged
    if layer.host is None:
        raise RuntimeError("a policy of heads on the host has made none")
    return layer, layer.host, query


def _one_layer(point: Point, held: int, setting: Setting) -> Any:
    """The smallest model with these heads; its matrices are not used."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=1, vocab_size=64,
        num_attention_heads=point.query_heads, num_key_value_heads=point.kv_heads,
        head_dim=point.head_dim, max_position_embeddings=2 * held,
    )  # fmt: skip
    with torch.device(setting.device):
        return LlamaForCausalLM(config).bfloat16().eval().requires_grad_(False)


OPERATIONS = (
    Operation("host_choose", _choose_points, _prepare_choose),
    Operation("host_fetch", _fetch_points, _prepare_fetch),
    Operation("host_join", _join_points, _prepare_join),
)
