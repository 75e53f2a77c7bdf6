"""Whole decode steps and prefills of the runtime itself: fused modules around the paged cache.

A step is one graph. What both take beside their parts is what the simulator learns from them.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import Any

import torch

from kvtune.common.transformers_interface import cache_argument
from kvtune.policies.option import Option
from kvtune.policies.page_formats import PAGE
from kvtune.policies.policy import Policy
from kvtune.profiles.kernel_table import Point
from kvtune.profiles.models import find_model, model_of_size
from kvtune.profiles.shape import ModelShape
from kvtune.runtime.cache.loading import load_cache
from kvtune.runtime.fuse import fused_on_gpu
from kvtune.runtime.graph import DecodeLoop
from kvtune.runtime.measure.filled import filled
from kvtune.runtime.measure.grid import Grid
from kvtune.runtime.measure.operation import Operation, Setting, Wanted, Work

MODELS = ("llama-8b", "smollm2-135m", "llama-3.2-1b")
CACHE_BYTES_MOST = 20 * 10**9
PREFILL_FLOPS = 5e13
"""Of a prefill, about: enough that the host, which launches kernel by kernel, is ahead."""

PROMPTS_MOST = 32
"""Of a prefill: each costs the host a little of its own."""


def _step_points(grid: Grid) -> Iterator[Wanted]:
    """None without Triton and a GPU: the kernels have nothing to be compiled for."""
    if not torch.cuda.is_available() or importlib.util.find_spec("triton") is None:
        return
    for shape in map(find_model, MODELS):
        for batch in grid.batches[::2]:
            for length in (grid.lengths[0], grid.lengths[:4][-1]):
                if batch * shape.kv_bytes(length) <= CACHE_BYTES_MOST:
                    yield Wanted(0, _point("runtime_step", shape, batch, length))


def _prefill_points(grid: Grid) -> Iterator[Wanted]:
    """As many prompts as keep a GPU busy; likewise none without one."""
    if not torch.cuda.is_available():
        return
    for shape in map(find_model, MODELS):
        for length in grid.prompts[1:4:2]:
            wanted = round(PREFILL_FLOPS / (2 * shape.active_parameters * length))
            batch = min(max(1, wanted), PROMPTS_MOST)
            yield Wanted(0, _point("runtime_prefill", shape, batch, length))


def _point(op: str, shape: ModelShape, batch: int, length: int) -> Point:
    """Of a batch of prompts of so many tokens."""
    return Point(
        op, "kvtune", "eager" if op == "runtime_prefill" else "graph", batch=batch,
        query_heads=shape.query_heads, kv_heads=shape.kv_heads, head_dim=shape.head_dim,
        length=length, rows=shape.layers,
        width_in=shape.hidden_size, width_out=shape.intermediate_size,
    )  # fmt: skip


def _prepare_step(point: Point, setting: Setting) -> Work:
    model = _random_model(point, setting)
    policy = Policy.uniform(Option(), point.rows, point.kv_heads)
    cache = filled(model, policy, point.length, point.batch, new_tokens=PAGE)
    cache.reserve(PAGE)
    first = torch.zeros(point.batch, dtype=torch.long, device=setting.device)
    loop = DecodeLoop(model, cache, first, torch.full_like(first, point.length), PAGE)
    embedding = 0 if model.config.tie_word_embeddings else model.model.embed_tokens.weight.nbytes
    weights = sum(parameter.nbytes for parameter in model.parameters()) - embedding
    return Work([RepeatedStep(loop)], weights + cache.prompt_bytes(), most_calls=1, steady=True)


def _prepare_prefill(point: Point, setting: Setting) -> Work:
    model = _random_model(point, setting)
    policy = Policy.uniform(Option(), point.rows, point.kv_heads)
    shape = (point.batch, point.length)
    prompts = torch.randint(0, model.config.vocab_size, shape, device=setting.device)
    places = torch.arange(point.length, device=setting.device).expand(shape)
    load_cache(policy, model, new_tokens=1).close()  # tries the model, which is not to be timed

    @torch.no_grad()
    def read() -> None:
        cache = load_cache(policy, model, new_tokens=1)
        with fused_on_gpu(model):
            model(
                input_ids=prompts, position_ids=places, use_cache=True, logits_to_keep=1,
                **cache_argument(model, cache),
            )  # fmt: skip
        cache.layers.clear()  # they refer to it, and would keep its memory until they are collected

    weights = sum(parameter.nbytes for parameter in model.parameters())
    return Work([read], weights, point.batch * point.length * weights, most_calls=1)


class RepeatedStep:
    """One step, and back to where it began: however often it is replayed, as much is read."""

    def __init__(self, loop: DecodeLoop) -> None:
        self.loop = loop
        lengths = [layer.paged.paged.lengths for layer in loop.cache.layers]
        self._state = lengths, [loop.positions, loop.at]
        self._begun = [[x.clone() for x in some] for some in self._state]

    def __call__(self) -> None:
        """Enqueue one decode step, then put the cache back to where it began."""
        with fused_on_gpu(self.loop.model):
            self.loop.advance(1)
        for now, then in zip(self._state, self._begun, strict=True):
            torch._foreach_copy_(now, then)


def _random_model(point: Point, setting: Setting) -> Any:
    """Llama's own code with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    known = model_of_size(point.rows, point.width_in, point.width_out)
    config = LlamaConfig(
        hidden_size=point.width_in, intermediate_size=point.width_out,
        num_hidden_layers=point.rows, num_attention_heads=point.query_heads,
        num_key_value_heads=point.kv_heads, head_dim=point.head_dim,
        vocab_size=known.vocab_size if known else setting.grid.vocabulary,
        tie_word_embeddings=known.tied_embeddings if known else True,
        max_position_embeddings=2 * point.length,
    )  # fmt: skip
    standard = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(setting.device):
            return LlamaForCausalLM(config).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(standard)


OPERATIONS = (
    Operation("runtime_step", _step_points, _prepare_step),
    Operation("runtime_prefill", _prefill_points, _prepare_prefill),
)
