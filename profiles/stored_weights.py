"""Bytes of a checkpoint that is already quantised: from its files, else from what its file says."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kvtune.common.errors import KvtuneError
from kvtune.profiles.parameter_counts import ParameterCounts, StoredWeights

_MOST_HEADER_BYTES = 100 * 2**20
# Modules that stay at 16 bits, by what their names hold, and the group of parameters that they are.
_GROUPS = {
    "attention": ("self_attn", "attn", "attention", "linear_attn", "mixer", "mamba"),
    "experts": ("experts",),
    "feed_forward": ("mlp", "feed_forward", "ffn", "shared_expert"),
}


def stored_weights(
    config: Mapping[str, Any], counts: ParameterCounts, file: str, folder: Path | None
) -> StoredWeights | None:
    """How a checkpoint stores its weights; None where it is not quantised.

    Raises:
        KvtuneError: its ``quantization_config`` or its files are malformed.
    """
    quantisation = config.get("quantization_config") or config.get("compression_config")
    if quantisation is None and isinstance(config.get("text_config"), Mapping):
        quantisation = config["text_config"].get("quantization_config")
    if quantisation is None:
        return None
    if not isinstance(quantisation, Mapping):
        raise KvtuneError("'quantization_config' must be an object", where=file)
    name, bits = _format(quantisation, file)
    measured = None if folder is None else _bytes_of_files(folder)
    if measured is not None:
        return StoredWeights(name, bits, measured, measured, measured)
    kept, some = _kept(quantisation, name)
    wide = sum(getattr(counts, group) for group in kept)
    size = 2.0 * (counts.sixteen_bit + wide) + (counts.matrices - wide) * bits / 8
    # Layers that are kept by their numbers, and matrices that a format leaves out.
    unsure = sum(getattr(counts, group) for group in some) * (2 - bits / 8)
    return StoredWeights(name, bits, size, 0.97 * size, 1.03 * size + unsure)


# Bits of a weight with its share of the scales, where the method alone says them.
_METHODS = {
    "fp8": ("fp8", 8.002), "fbgemm_fp8": ("fp8", 8.01), "ptpc_fp8": ("fp8", 8.01),
    "mxfp4": ("mxfp4", 4.25), "mxfp8": ("mxfp8", 8.25), "nvfp4": ("nvfp4", 4.5),
    "petit_nvfp4": ("nvfp4", 4.5), "modelopt_fp4": ("nvfp4", 4.5), "fp_quant": ("nvfp4", 4.5),
    "eetq": ("int8", 8.01), "bitnet": ("bitnet 1.58 bits", 2.0), "spqr": ("spqr", 3.5),
    "aqlm": ("aqlm", 2.3), "vptq": ("vptq", 2.3), "higgs": ("higgs", 4.25), "exl2": ("exl2", 4.5),
    "experts_int8": ("int8 experts", 8.01), "deepspeedfp": ("fp8", 8.25),
    "compressed-tensors": ("compressed", 8.01),
}  # fmt: skip


def _format(quantisation: Mapping[str, Any], file: str) -> tuple[str, float]:
    """A format's name and the bits of one of its weights."""
    method = str(quantisation.get("quant_method", quantisation.get("quant_algo", ""))).lower()
    if method in ("gptq", "awq", "auto-round", "autoround", "gptqmodel", "hqq", "intel/auto-round"):
        bits = _number(quantisation, ("bits", "w_bit", "nbits", "weight_bits"), 4, file)
        group = _number(quantisation, ("group_size", "q_group_size"), 128, file)
        return f"{method} int{bits:g}", bits + ((16 + bits) / group if group > 0 else 0.01)
    if method in ("bitsandbytes", "bnb"):
        if quantisation.get("load_in_4bit") or quantisation.get("_load_in_4bit"):
            return "bitsandbytes 4 bits", (
                4.127 if quantisation.get("bnb_4bit_use_double_quant") else 4.5
            )
        return "bitsandbytes int8", 8.01
    if method in ("compressed-tensors", "modelopt", "quark"):
        return _grouped(quantisation, method, file)
    if method in ("torchao", "quanto"):
        return _by_name(method, json.dumps(quantisation, default=str).lower())
    if method in _METHODS:
        return _METHODS[method]
    raise KvtuneError(
        f"the size of weights quantised by {method[:40] or 'no named method'!r} is not known",
        where=file,
        hint="a folder with the .safetensors files says it.",
    )


def _grouped(quantisation: Mapping[str, Any], method: str, file: str) -> tuple[str, float]:
    """Formats that describe each group of modules: the first group that quantises weights."""
    groups = quantisation.get("config_groups")
    found = list(groups.values()) if isinstance(groups, Mapping) else []
    for group in (*found, quantisation.get("global_quant_config")):
        weights = (group.get("weights") or group.get("weight")) if isinstance(group, Mapping) else 0
        if isinstance(weights, Mapping) and "num_bits" in weights:
            bits = _number(weights, ("num_bits",), 8, file)
            size = _number(weights, ("group_size",), 0, file)
            kind = str(weights.get("type", "int"))
            scale = 8 if kind == "float" and bits == 4 else 16
            return f"{kind}{bits:g}", bits + (scale / size if size > 0 else 0.01)
    text = json.dumps(quantisation, default=str).lower()
    return _by_name(method, text)


def _by_name(method: str, text: str) -> tuple[str, float]:
    """The bits that a free description names."""
    for part, answer in (
        ("nvfp4", ("nvfp4", 4.5)), ("mxfp4", ("mxfp4", 4.25)), ("w4a16", ("int4", 4.16)),
        ("int4", ("int4", 4.25)), ("uint4", ("int4", 4.25)), ("int2", ("int2", 2.25)),
        ("fp8", ("fp8", 8.01)), ("float8", ("fp8", 8.01)), ("int8", ("int8", 8.01)),
    ):  # fmt: skip
        if part in text:
            return answer
    return method, 8.01


def _number(values: Mapping[str, Any], names: tuple[str, ...], missing: float, file: str) -> float:
    for name in names:
        value = values.get(name)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float)) or abs(value) > 2**20:
            raise KvtuneError(f"{name!r} must be a number, not {str(value)[:40]!r}", where=file)
        return float(value)
    return missing


def _kept(quantisation: Mapping[str, Any], name: str) -> tuple[set[str], set[str]]:
    """Groups that stay at 16 bits whole, and those of which some layers do."""
    listed: list[str] = []
    for key in ("modules_to_not_convert", "ignore", "ignored_layers", "exclude_modules",
                "llm_int8_skip_modules", "exclude"):  # fmt: skip
        value = quantisation.get(key)
        listed += [v for v in value if isinstance(v, str)] if isinstance(value, list) else []
    whole: set[str] = set()
    some: set[str] = set()
    for entry in listed:
        group = next((g for g, parts in _GROUPS.items() if any(p in entry for p in parts)), None)
        if group is not None and "gate" not in entry.rsplit(".", 1)[-1]:
            (some if any(part.isdigit() for part in entry.split(".")) else whole).add(group)
    if name in ("mxfp4", "int8 experts"):  # only experts are quantised
        whole |= {"attention", "feed_forward"}
    return whole, some - whole


# --- files -----------------------------------------------------------------------------------


def _bytes_of_files(folder: Path) -> int | None:
    """Bytes of all tensors in a folder's safetensors files; None where there are none."""
    index = folder / "model.safetensors.index.json"
    files = sorted(folder.glob("*.safetensors"))
    if index.is_file() and len(files) != len(_shards(index)):
        total = _index(index).get("metadata", {}).get("total_size")
        return int(total) if isinstance(total, (int, float)) and 0 < total < 2**50 else None
    return sum(_tensor_bytes(file) for file in files) if files else None


def _index(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise KvtuneError("this is no readable index of weights", where=str(file)) from error
    if not isinstance(content, dict) or not isinstance(content.get("metadata", {}), dict):
        raise KvtuneError("this is no index of weights", where=str(file))
    return content


def _shards(file: Path) -> set[str]:
    names = _index(file).get("weight_map")
    return {str(name) for name in names.values()} if isinstance(names, dict) else set()


def _tensor_bytes(file: Path) -> int:
    """Bytes of a safetensors file's tensors: all that stands behind its header."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        header = int.from_bytes(stream.read(8), "little")
    if not 2 <= header <= min(_MOST_HEADER_BYTES, size - 8):
        raise KvtuneError("this is no safetensors file", where=str(file))
    return size - 8 - header
