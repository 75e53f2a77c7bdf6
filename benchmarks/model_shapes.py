"""Our shapes beside transformers' own classes: every decoder type, with the numbers it assumes.

    python benchmarks/model_shapes.py [TYPE ...] > benchmarks/results/model_shapes.md

Parameters are counted here in the class by themselves; the cache is measured in two other ways: by
the outputs of each layer's projections, and by giving the class 5,000 tokens on the meta device and
adding up every tensor that its cache then holds, whatever it is called. A type is ``same``,
``interval`` where a tower cannot be built, ``refused`` with our reason, or ``DIFFERENT``; the exit
code counts the last.
"""

from __future__ import annotations

import contextlib
import math
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from kvtune.common.errors import KvtuneError
from kvtune.profiles.class_cache import filled_cache
from kvtune.profiles.layer_cache import LayerCache
from kvtune.profiles.model_config import shape_of
from kvtune.profiles.shape import ModelShape

_CONTEXT, _GROWN = 131_072, 5_000
VERDICTS = ("same", "interval", "refused", "DIFFERENT")


def theirs(kind: str) -> tuple[int, int | None, int, int | None]:
    """Parameters, bytes a token where projections say them, layers, bytes of a long cache."""
    import torch
    import transformers

    config = transformers.CONFIG_MAPPING[kind]()
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    corrections = [b for n, b in model.named_buffers() if n.endswith("e_score_correction_bias")]
    counted = sum(p.numel() for p in [*model.parameters(), *corrections])
    layers = getattr(config.get_text_config(decoder=True), "num_hidden_layers", 0)
    a_token = projected_bytes(model)
    return counted, a_token, layers, grown_bytes(model)


def grown_bytes(model: Any) -> int | None:
    """Bytes of every tensor that the cache of a long prompt holds; None where it cannot be run."""
    with contextlib.suppress(Exception):  # routing needs values, which the meta device lacks
        cache = filled_cache(model.eval(), _GROWN)
        if cache is not None:
            found = {id(t): t for layer in cache.layers for t in tensors(vars(layer))}
            return sum(math.prod(t.shape[1:]) * t.element_size() for t in found.values())
    return None


def tensors(held: Any) -> Iterator[Any]:
    """All tensors of a sequence in what is held, but for single numbers."""
    import torch

    if isinstance(held, torch.Tensor):
        if held.dim() > 1:
            yield held
    elif isinstance(held, dict):
        for value in held.values():
            yield from tensors(value)


def held_bytes(shape: ModelShape) -> float:
    """Bytes that we say, where a dynamic cache lets go of a window's oldest token at once."""
    return sum(_one_less(layer).bytes(_GROWN, 2) for layer in shape.layer_caches)


def _one_less(layer: LayerCache) -> LayerCache:
    return layer if layer.window is None else replace(layer, window=layer.window - 1)


def projected_bytes(model: Any) -> int | None:
    """Bytes that a token adds, from the outputs of all key and value projections."""
    text = model.config.get_text_config(decoder=True)
    modes = getattr(text, "kv_sharing_modes", None)
    sizes = [
        getattr(module, name).out_features
        for module in model.modules()
        for name in ("k_proj", "v_proj")
        if isinstance(getattr(module, "layer_idx", None), int)
        and hasattr(getattr(module, name, None), "out_features")
        and not (modes and modes[module.layer_idx] == "reuse")
    ]
    # Cross-attention and linear layers have projections too, whose outputs are not cached so.
    kinds = {type(module) for module in model.modules() if hasattr(module, "k_proj")}
    plain = len(sizes) == 2 * text.num_hidden_layers and len(kinds) == 1
    return 2 * sum(sizes) if plain else None


def compare(kind: str) -> tuple[str, str]:
    """The verdict and the row of one type."""
    try:
        shape = shape_of({"model_type": kind}, kind, kind)
    except KvtuneError as refused:
        return "refused", f"| {kind} | refused | {refused.message.replace('|', '/')} | | |"
    if shape.parameter_counts().unknown:
        low, high = shape.parameters, shape.parameters + shape.parameter_counts().unknown
        return "interval", f"| {kind} | interval | {low:,} to {high:,} | | | |"
    parameters, a_token, layers, grown = theirs(kind)
    ours, state = shape.kv_bytes_per_token(), sum(c.state_bytes for c in shape.layer_caches)
    if shape.layers != layers:  # layers that run in loops cache once a loop
        a_token = None
        grown = None
    held = held_bytes(shape)
    same = shape.parameters == parameters and a_token in (None, ours) and grown in (None, held)
    verdict = "same" if same else "DIFFERENT"
    difference = "" if same else f" ({parameters:,}, {a_token}, {grown} for {held:.0f})"
    seen = "" if a_token is None else " (projections agree)"
    seen += "" if grown is None else f" ({_GROWN:,} tokens agree)"
    row = f"| {kind} | {verdict}{difference} | {shape.parameters:,} | {ours:,}{seen} | "
    return verdict, f"{row}{state:,} | {shape.kv_bytes(_CONTEXT):,} |"


def main() -> int:
    """Print the table of the types named, or of all."""
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    transformers.utils.logging.set_verbosity(50)
    print(f"transformers {transformers.__version__}, the numbers that each type's class assumes.\n")
    print("| type | verdict | parameters | B a token | state B | B of 131,072 tokens |")
    print("|---|---|---|---|---|---|")
    verdicts = []
    for kind in sys.argv[1:] or sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        verdict, row = compare(kind)
        verdicts.append(verdict)
        print(row, flush=True)
    counted = {name: verdicts.count(name) for name in VERDICTS}
    print("\n" + ", ".join(f"{name}: {number}" for name, number in counted.items()))
    return counted["DIFFERENT"]


if __name__ == "__main__":
    import os

    with tempfile.TemporaryDirectory() as folder:  # nothing that was remembered is compared
        os.environ["KVTUNE_CACHE"] = str(Path(folder))
        raise SystemExit(main())
