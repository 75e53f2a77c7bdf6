"""llama.cpp's compute buffers: what it reserves and what its logs say, beside what is predicted.

    pip install xllamacpp gguf                                    # for the second part only
    python -m kvtune.benchmarks.llama_buffers --run --out FILE

``data/llama_buffers.csv`` holds "compute buffer size" of logs of GPUs, each with its source. With
``--run`` llama.cpp itself reserves its buffers for shapes of many widths, on a CPU, from files
whose weights are holes: nothing is computed. A build for a CPU has one buffer: the GPU's and, of
the host's, three hidden states of a micro-batch; masks are there once.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path

from kvtune.cli.llama_args import read_llama_args
from kvtune.common.units import MIB
from kvtune.profiles.gpus import find_gpu
from kvtune.profiles.models import find_model
from kvtune.profiles.shape import ModelShape
from kvtune.simulator.memory.llama_memory import NEWEST, llama_memory

GOAL = 0.02
SHAPES = {  # names as llama.cpp has them of the models whose graphs it reserves
    "llama": (
        "llama-3.1-8b", "llama-3.1-70b", "llama-3.2-1b", "llama-3.2-3b", "mistral-7b-v0.3",
        "mistral-small-24b", "ministral-8b", "smollm2-135m", "smollm2-1.7b",
    ),
    "qwen2": ("qwen2.5-7b", "qwen2.5-14b", "qwen2.5-0.5b"),
    "qwen3": ("qwen3-0.6b", "qwen3-4b", "qwen3-8b", "qwen3-32b"),
    "qwen3moe": ("qwen3-30b-a3b", "qwen3-235b-a22b"),
    "gemma3": ("gemma-3-4b", "gemma-3-12b", "gemma-3-27b"),
}  # fmt: skip
FLAGS = (
    "-c 2048 -fa on", "-c 32768 -fa on", "-c 8192 -ub 2048 -fa on", "-c 32768 -np 4 -fa on",
    "-c 8192 -fa off",
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One buffer in MiB: as llama.cpp has it, as it is predicted, and between which ends."""

    name: str
    reserved: float
    predicted: float
    low: float
    high: float
    source: str

    @property
    def off(self) -> float:
        """The relative error."""
        return self.predicted / self.reserved - 1

    @property
    def covered(self) -> bool:
        """Whether the interval holds the buffer, to the two digits that are printed."""
        slack = 0.05 + 0.01 * self.reserved
        return self.low - slack <= self.reserved <= self.high + slack


def logged() -> list[Row]:
    """The GPU's buffer of every log."""
    file = resources.files("kvtune.benchmarks") / "data" / "llama_buffers.csv"
    rows = []
    for record in csv.DictReader(file.read_text("utf-8").splitlines()):
        flags, _ = read_llama_args(record["flags"])
        found = llama_memory(
            find_model(record["model"]), find_gpu("h200"), "bf16", flags, record["build"]
        ).compute
        ends = (found.value / MIB, found.low / MIB, found.high / MIB)
        name = f"{record['model']} {record['build']} {record['flags']}"
        rows.append(Row(name, float(record["device_mib"]), *ends, record["source"]))
    return rows


def reserved() -> Iterator[Row]:
    """The buffer of a build for a CPU, of every shape and set of flags."""
    for architecture, names in SHAPES.items():
        for name in names:
            shape = find_model(name)
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "model.gguf"
                write_holes(path, architecture, shape)
                for text in FLAGS:
                    yield _reserved(path, shape, text)


def _reserved(path: Path, shape: ModelShape, text: str) -> Row:
    flags, _ = read_llama_args(text)
    found = llama_memory(shape, find_gpu("h200"), "bf16", flags, NEWEST).compute
    inputs = 3 * 4 * flags.ubatch * shape.hidden_size
    value, low, high = ((end + inputs) / MIB for end in (found.value, found.low, found.high))
    source = "llama.cpp in xllamacpp, reserving for a CPU"
    return Row(f"{shape.name} {text}", start(path, text), value, low, high, source)


def start(path: Path, text: str) -> float:
    """MiB that llama.cpp says it computes in; it is stopped as soon as it has said so."""
    flags, _ = read_llama_args(text)
    kind = "ENABLED" if flags.flash else "DISABLED"
    code = f"""
import xllamacpp
params = xllamacpp.CommonParams()
params.model.path, params.verbosity, params.warmup = {str(path)!r}, 10, False
params.n_ctx, params.n_ubatch, params.n_batch = {flags.ctx_size}, {flags.ubatch}, 2048
params.n_parallel, params.kv_unified, params.n_gpu_layers = {flags.slots}, {flags.unified}, 0
params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_{kind}
xllamacpp.Server(params)
"""
    with subprocess.Popen(  # noqa: S603 - this Python, code from above
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as child:
        assert child.stdout is not None
        told = []
        for line in child.stdout:
            told.append(line)
            if found := re.search(r"compute buffer size =\s*([\d.]+) MiB", line):
                child.kill()
                return float(found[1])
    raise RuntimeError("".join(told[-10:]))


def write_holes(path: Path, architecture: str, shape: ModelShape) -> None:
    """Write a GGUF file of two layers (six where some have a window), its weights a hole."""
    import gguf
    import numpy as np

    layers = 6 if any(shape.windows) else 2
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in {
        "context_length": shape.max_context, "embedding_length": shape.hidden_size,
        "block_count": layers, "feed_forward_length": shape.intermediate_size,
        "attention.head_count": shape.query_heads, "attention.head_count_kv": shape.kv_heads,
        "attention.key_length": shape.head_dim, "attention.value_length": shape.head_dim,
        "rope.dimension_count": shape.head_dim, "vocab_size": shape.vocab_size,
    }.items():  # fmt: skip
        writer.add_uint32(f"{architecture}.{key}", value)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("none")
    if windows := [window for window in shape.windows if window]:
        writer.add_sliding_window(windows[0])
    if shape.experts:
        writer.add_expert_count(shape.experts.count)
        writer.add_expert_used_count(shape.experts.active)
        writer.add_expert_feed_forward_length(shape.experts.intermediate_size)
    size = 0
    for name, dims in tensors(architecture, shape, layers):
        narrow = len(dims) == 1 or "gate_inp" in name
        kind = np.dtype(np.float32 if narrow else np.float16)
        count = int(np.prod(dims)) * kind.itemsize
        writer.add_tensor_info(name, dims, kind, count)
        size += gguf.GGUFWriter.ggml_pad(count, 32)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    assert writer.fout is not None
    file = writer.fout[0]
    file.truncate(gguf.GGUFWriter.ggml_pad(file.tell(), 32) + size)
    writer.close()


def tensors(
    architecture: str, shape: ModelShape, layers: int
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and sizes as llama.cpp looks for them."""
    hidden, head = shape.hidden_size, shape.head_dim
    queries, keys = shape.query_heads * head, shape.kv_heads * head
    yield "token_embd.weight", (shape.vocab_size, hidden)
    yield "output_norm.weight", (hidden,)
    if not shape.tied_embeddings:
        yield "output.weight", (shape.vocab_size, hidden)
    for layer in range(layers):
        own = {
            "attn_norm": (hidden,), "attn_q": (queries, hidden), "attn_k": (keys, hidden),
            "attn_v": (keys, hidden), "attn_output": (hidden, queries), "ffn_norm": (hidden,),
        }  # fmt: skip
        if shape.experts:
            count, wide = shape.experts.count, shape.experts.intermediate_size
            own |= {
                "ffn_gate_inp": (count, hidden), "ffn_gate_exps": (count, wide, hidden),
                "ffn_up_exps": (count, wide, hidden), "ffn_down_exps": (count, hidden, wide),
            }  # fmt: skip
        else:
            wide = shape.intermediate_size
            own |= {
                "ffn_gate": (wide, hidden), "ffn_up": (wide, hidden), "ffn_down": (hidden, wide)
            }  # fmt: skip
        if architecture in ("qwen3", "qwen3moe", "gemma3"):
            own |= {"attn_q_norm": (head,), "attn_k_norm": (head,)}
        if architecture == "gemma3":
            own |= {"post_attention_norm": (hidden,), "post_ffw_norm": (hidden,)}
        yield from ((f"blk.{layer}.{name}.weight", dims) for name, dims in own.items())
        if architecture == "qwen2":
            for name, width in (("attn_q", queries), ("attn_k", keys), ("attn_v", keys)):
                yield f"blk.{layer}.{name}.bias", (width,)


def summary(rows: list[Row]) -> dict[str, float]:
    """How many, how many within the goal, median and worst error, how many inside."""
    errors = [abs(row.off) for row in rows]
    return {
        "buffers": len(rows),
        "within 2 %": sum(error <= GOAL for error in errors),
        "median %": round(100 * statistics.median(errors), 2),
        "worst %": round(100 * max(errors), 1),
        "inside the interval": sum(row.covered for row in rows),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", action="store_true", help="ask llama.cpp itself too")
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    parts = {"logs": logged()}
    if asked.run:
        parts["reserved"] = list(reserved())
    print("| buffer | MiB | predicted | off | inside |\n|---|---|---|---|---|")
    for rows in parts.values():
        for row in rows:
            inside = "yes" if row.covered else "no"
            figures = f"{row.reserved:.2f} | {row.predicted:.2f} | {100 * row.off:+.1f} %"
            print(f"| {row.name} | {figures} | {inside} |")
    totals = {name: summary(rows) for name, rows in parts.items()}
    print(json.dumps(totals, indent=1))
    if asked.out:
        rows_of = {name: [asdict(row) for row in rows] for name, rows in parts.items()}
        told = {"totals": totals, **rows_of}
        asked.out.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
