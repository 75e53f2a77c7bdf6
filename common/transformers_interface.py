"""What kvtune relies on in transformers, in one place, with the releases that it was tried with.

Public names only, but for reading which attention a model answers with. Whatever differs between
releases is answered by a function of this file, so that a new release is taken in here alone:

- a model's ``forward`` takes the KV cache as ``past_key_values`` before 5.24, as ``cache`` since;
- a cache layer's ``get_mask_sizes`` gets the positions of the queries in the first releases, their
  number later, and its ``get_max_length`` was called ``get_max_cache_shape``;
- GGUF weights stay packed unless ``GgufConfig`` says otherwise, in the releases that have it.

The classes and functions that are imported elsewhere are in ``NAMES``; a test holds that list
against the source and against the installed release. Python 3.10 gets no release after 5.20.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

TRIED = ("5.0.0", "5.17.0", "5.20.2", "5.23.0", "5.24.0")
"""Releases with which the tests of models, caches and exports passed."""

NAMES = (
    "transformers.AutoConfig",
    "transformers.AttentionInterface",
    "transformers.AttentionMaskInterface",
    "transformers.AutoModelForCausalLM",
    "transformers.AutoModelForImageTextToText",
    "transformers.AutoTokenizer",
    "transformers.CONFIG_MAPPING",
    "transformers.Cache",
    "transformers.CacheLayerMixin",
    "transformers.DynamicCache",
    "transformers.LlamaConfig",
    "transformers.LlamaForCausalLM",
    "transformers.models.auto.modeling_auto",
    "transformers.utils.logging",
)
"""What the product imports; exported code imports nothing else from transformers either."""


def register_attention(name: str, attention: Callable[..., Any], mask: Callable[..., Any]) -> None:
    """Make an attention function and its mask function known by a name; safe to call again."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, mask)


@contextmanager
def attention_restored(model: Any) -> Iterator[None]:
    """Give a model the attention implementation back that it has now, when the block ends."""
    before = model.config._attn_implementation  # there is no other way to ask
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def cache_argument(model: Any, cache: Any) -> dict[str, Any]:
    """The keyword argument that gives a model's ``forward`` its KV cache, under its own name."""
    takes = inspect.signature(model.forward).parameters
    return {"cache" if "cache" in takes else "past_key_values": cache}


def is_given(cache: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a cache is among the arguments of a call, whatever the argument's name."""
    return any(value is cache for value in (*args, *kwargs.values()))


def count_of(queries: int | Tensor) -> int:
    """The number of queries that ``get_mask_sizes`` is asked about."""
    return queries if isinstance(queries, int) else len(queries)


def unpacked_gguf() -> dict[str, Any]:
    """Arguments of ``from_pretrained`` that turn a GGUF's blocks into plain weights."""
    import transformers

    if hasattr(transformers, "GgufConfig"):
        return {"quantization_config": transformers.GgufConfig(dequantize=True)}
    return {}


@contextmanager
def gguf_read_once() -> Iterator[None]:
    """Parse a GGUF once in the block, and name the tensors of an architecture once.

    transformers parses the whole file for its configuration, its tokenizer and its weights, and
    makes the table of all names anew for every module: most of the time that a conversion takes.
    """
    import gguf

    before = gguf.GGUFReader, gguf.get_tensor_name_map
    gguf.GGUFReader, gguf.get_tensor_name_map = map(cache, before)
    try:
        yield
    finally:
        gguf.GGUFReader, gguf.get_tensor_name_map = before
