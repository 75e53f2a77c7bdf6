"""Tables in the layout of aiconfigurator-core, made up from a formula."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet as parquet

FLOOR, RATE = 8e-6, 4e12  # of the made-up card: seconds, bytes a second


def decode_s(batch: float, tokens: float, kv: int, width: int = 128) -> float:
    return float(np.hypot(FLOOR, batch * tokens * kv * width * 4 / RATE))


def context_s(batch: float, tokens: float, query: int) -> float:
    return FLOOR + batch * tokens**2 * query * 128 * 2 / 5e14


def matrix_s(rows: float, out: float, wide: float) -> float:
    return 3e-6 + max(2 * out * wide / RATE, 2 * rows * out * wide / 6e14)


def latent_s(batch: float, tokens: float, heads: int, bytes_each: float) -> float:
    """A decode step's latent attention: the latents once, and heads that multiply with them."""
    read = batch * tokens * 576 * bytes_each / RATE
    return FLOOR + read + batch * tokens * heads * 1088 * 2 / 5e14


def write(folder: Path, op: str, stack: str, version: str, file: str, rows: list[Any]) -> None:
    place = folder / "data" / "h200_sxm" / op / stack / version
    place.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.Table.from_pylist(rows), place / f"{file}.parquet")


def write_systems(folder: Path) -> None:
    """Tables of one system and stack: attention, matrices, sums over GPUs and experts."""
    sizes = (1, 4, 16, 64)
    heads = ((32, 8), (16, 4), (8, 2), (8, 1))
    lengths = (1, 16, 256, 1024, 4096, 16384)
    base = {"kernel_source": "fa", "head_dim": 128, "window_size": 0}
    formats = {"bfloat16": 1.0, "fp8": 0.5}  # and how many of the bytes are read
    decode: list[Any] = [
        {**base, "kv_cache_dtype": form, "batch_size": b, "step": n - 1, "num_heads": q,
         "num_key_value_heads": k, "latency": 1e3 * decode_s(b, n * formats[form], k)}
        for b, n, (q, k), form in itertools.product(sizes, lengths, heads, formats)
    ]  # fmt: skip
    context: list[Any] = [
        {**base, "kv_cache_dtype": form, "batch_size": b, "isl": n, "num_heads": q,
         "num_key_value_heads": k, "latency": 1e3 * context_s(b, n, q)}
        for b, n, (q, k), form in itertools.product(sizes, lengths[1:], heads, formats)
    ]  # fmt: skip
    write(folder, "attention", "vllm", "0.24.0", "generation_attention_perf", decode)
    slow = [{**row, "latency": 1.0} for row in decode]
    write(folder, "attention", "vllm", "0.9.1", "generation_attention_perf", slow)
    write(folder, "attention", "vllm", "0.24.0", "context_attention_perf", context)
    widths = (256, 1024, 4096, 16384, 131072)
    matrices: list[Any] = [
        {"gemm_dtype": "bfloat16", "kernel_source": name, "m": m, "n": n, "k": k,
         "latency": 1e3 * slower * matrix_s(m, n, k)}
        for m, n, k in itertools.product((1, 8, 64, 512, 8192), widths, widths)
        for name, slower in (("quick", 1), ("slow", 3))
    ]  # fmt: skip
    write(folder, "gemm", "vllm", "0.24.0", "gemm_perf", matrices)
    sums = [
        {"num_gpus": g, "message_size": 4**i, "kernel_source": kind,
         "latency": 1e3 * (5e-6 + 2 * 4**i / 3e11) * slower}
        for g in (2, 4) for i in range(4, 14) for kind, slower in (("x_graph", 1), ("x_eager", 9))
    ]  # fmt: skip
    write(folder, "comm", "vllm", "0.24.0", "custom_allreduce_perf", sums)
    experts = [
        {"moe_dtype": "bfloat16", "kernel_source": "e", "num_tokens": n, "hidden_size": 2048,
         "inter_size": 768, "topk": 8, "num_experts": 128, "moe_tp_size": 1, "moe_ep_size": ep,
         "distribution": "balanced", "latency": 0.05 * n / ep + 0.1}
        for n in (1, 16, 256) for ep in (1, 2)
    ]  # fmt: skip
    experts += [  # one is the faster for few tokens, the other for many
        experts[0] | {"moe_dtype": form, "num_tokens": n, "latency": latency}
        for form, times in (("fp8", (0.1, 0.4, 9.0)), ("fp8_block", (0.2, 0.3, 1.0)))
        for n, latency in zip((1, 16, 256), times, strict=True)
    ]
    write(folder, "moe", "vllm", "0.24.0", "moe_perf", experts)


def write_latent(folder: Path, stack: str, whole: bool) -> None:
    """Latent attention of a stack: the kernel and its products, or whole layers of attention."""
    sizes, lengths, heads = (1, 4, 16, 64), (1, 16, 256, 1024, 4096, 16384), (8, 16, 32, 128)
    formats = {"bfloat16": 2.0, "fp8": 1.0}
    every = list(itertools.product(sizes, lengths, heads, formats))
    more = {"mla_dtype": "bfloat16", **({"gemm_type": "fp8_block"} if whole else {})}
    extra = 50e-6 if whole else 0.0  # of the projections
    decode = [
        {**more, "kv_cache_dtype": form, "batch_size": b, "step": n - 1, "num_heads": h,
         "latency": 1e3 * (latent_s(b, n, h, formats[form]) + extra)}
        for b, n, h, form in every
    ]  # fmt: skip
    context = [
        {**more, "kv_cache_dtype": form, "batch_size": b, "isl": n, "num_heads": h,
         "latency": 1e3 * (context_s(b, n, h) + extra)}
        for b, n, h, form in every
    ]  # fmt: skip
    names = ("mla_{}_module_perf",) * 2 if whole else ("{}_mla_perf",) * 2
    for kind, name, rows in zip(("generation", "context"), names, (decode, context), strict=True):
        write(folder, "mla", stack, "1.0", name.format(kind), rows)
    products = [
        {"op_name": name, "bmm_dtype": "bfloat16", "num_tokens": n, "num_heads": h,
         "latency": 1e3 * (2e-6 + n * h * 128 * 512 * 2 / 5e14)}
        for name in ("mla_gen_pre", "mla_gen_post") for n in (1, 64, 4096) for h in heads
    ]  # fmt: skip
    write(folder, "mla_bmm", stack, "1.0", "mla_bmm_perf", products)
