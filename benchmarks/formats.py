"""Storage formats on a GPU: kernels of few bits, rotated and not, and what every format loses live.

    python benchmarks/formats.py --out benchmarks/results/formats-h200.json [--seconds 240]

``kernels`` times decode attention of one layer (8 sequences, 8 KV heads of 128 channels, 4 queries
each) cold, in CUDA graphs, over 64 MB to 1 GB of what bf16 would take, and holds its output against
dequantise-then-attend in float64. ``live`` runs SmolLM2-135M in float32 with all tokens kept: the
divergence from the full cache at observed tokens, by kind of text, at each format's bytes, tables
and all. Samples are taken one of each kind in turn until the time is up. A case that fails is
recorded. ``--tune`` instead tries other shapes of the kernel for rotated pairs, one parameter after
another, each from the best so far. ``--device cpu --tiny`` (with TRITON_INTERPRET=1) shows that it
runs to its end. OSCAR's rotations are fitted first, to texts of the search split. With ``--live``
no kernel is timed, with ``--kernels`` nothing else; ``--only`` and ``--tokens`` make that short
enough for a CPU:

    python benchmarks/formats.py --live --device cpu --tokens 1024 --each 1 \
        --only "weighted, allocated 2.125" turboquant2 kitty+4 --out formats-signs-cpu.json
    python benchmarks/formats.py --live --device cpu --tokens 1024 --each 2 --seconds 900 \
        --only int4 int4_token_head int8_token_head fp8_token_head q8_0 q4_0 q8_0-rotated \
        q4_0-rotated openvino_u8 openvino_u4 --out formats-stacks-cpu.json
"""

from __future__ import annotations

import argparse
import fcntl
import json
import math
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import paged
import torch

from kvtune.policies.format import Format, formats
from kvtune.policies.formats.blocked import block_forms
from kvtune.policies.formats.fitted import Allocated, Fitted
from kvtune.policies.formats.grouped import Int2, Int4
from kvtune.policies.formats.hqq import Hqq2
from kvtune.policies.formats.kitty import Kitty
from kvtune.policies.formats.kivi import Kivi
from kvtune.policies.formats.llama_cpp import Q4, Q8
from kvtune.policies.formats.rotated import RotatedInt2, RotatedInt4
from kvtune.policies.formats.turboquant import TurboQuant1, TurboQuant2, TurboQuant3
from kvtune.policies.methods.full import Full
from kvtune.policies.methods.oscar import Oscar
from kvtune.policies.methods.weighted_keys import WeightedKeys
from kvtune.policies.option import ALL, Option
from kvtune.policies.policy import Policy
from kvtune.runtime.kernels.launch import Shape, decode
from kvtune.runtime.kernels.reference import attend
from kvtune.runtime.learn import WORKLOAD, rotations
from kvtune.runtime.live import run_live
from kvtune.runtime.prompts import fresh_prompt
from kvtune.traces.learned import keep_learned
from kvtune.traces.models import load_model
from kvtune.traces.workloads import Workload, build
from kvtune.tuner.quality import estimate, ratio_interval
from kvtune.tuner.validate import union_of_needs

KINDS = ("prose", "code", "retrieval")
BATCH, KV_HEADS, GROUP, HEAD_DIM = 8, 8, 4, 128
SIZES_MB = (64, 256, 512, 1024)
PAIRS = {
    "bf16": ("bf16", "bf16"),
    "int8": ("int8", "int8"),
    "rotated int8": ("rotated_int8-token", "rotated_int8"),
    "int4": ("int4", "int4"),
    "rotated int4": ("rotated_int4-token", "rotated_int4"),
    "int4 keys, rotated int4 values": ("int4", "rotated_int4"),
    "int3": ("int3", "int3"),
    "rotated int3": ("rotated_int3-token", "rotated_int3"),
    "int2": ("int2", "int2"),
    "rotated int2": ("rotated_int2-token", "rotated_int2"),
    "rotated int4 keys, rotated int2 values": ("rotated_int4-token", "rotated_int2"),
    "allocated 2.25, 2 rotated": ("signs2.25", "rotated_signs2"),
    "allocated 2, 2": ("signs2", "signs2"),
    "allocated 3, 3 rotated": ("signs3", "rotated_signs3"),
    "fp8": ("fp8", "fp8"),
    **{name: (name, name) for name in block_forms() if "/" not in name},
}
TUNED = (
    "allocated 2.25, 2 rotated", "allocated 3, 3 rotated",
    "rotated int4", "rotated int3", "rotated int2", "int4", "int3",
)  # fmt: skip
TRIED = (
    Shape(), Shape(programs=1024), Shape(stages=2), Shape(stages=4),
    Shape(registers=168, programs=1536),
)  # fmt: skip
"""1,024 programs are 16 tiles for each of 64 rows, as were cut before all that run at once were
used. More run where each takes fewer registers; formats-tune-2-h200.json has seven such shapes, all
slower. So were all in formats-tune-3-h200.json that asked for a tile's first pages before its
queries were made ready, which the kernel then had as a choice."""
TINY = {"search": {"prose": 1}}
TOGETHER = 4  # policies in one batch
BASE = "int2"  # each format is shown with this one's loss divided by its own


class Found:
    """What was measured, written after every case; knows when the time is up."""

    def __init__(self, out: Path, seconds: float, *sections: str) -> None:
        self.out, self.begun, self.seconds = out, time.monotonic(), seconds
        self.figures: dict[str, Any] = {name: {} for name in (*sections, "failed")}

    def write(self) -> None:
        self.figures["seconds"] = round(time.monotonic() - self.begun, 1)
        self.out.write_text(json.dumps(self.figures, indent=1) + "\n", encoding="utf-8")

    def is_over(self) -> bool:
        return time.monotonic() - self.begun > self.seconds

    def attempt(self, name: str, case: Callable[[], Any]) -> Any:
        """A case's answer; None where it fails, which is noted."""
        try:
            return case()
        except Exception as error:
            self.figures["failed"][name] = f"{type(error).__name__}: {error}"[-600:]
            traceback.print_exc()
            return None


def error(pair: tuple[str, str], head_dim: int, tokens: int) -> dict[str, float]:
    """Largest difference from dequantise-then-attend: as it is, and over the largest output."""
    rows = 2
    layer = paged.make_layer(paged.uniform(rows, tokens, *pair), rows, GROUP, head_dim)
    q = torch.randn(rows, GROUP, head_dim, device=paged.DEVICE, dtype=torch.bfloat16)
    scale = head_dim**-0.5
    out = torch.empty(q.shape, device=paged.DEVICE)
    decode(q, layer.paged, layer.scratch, scale, out)
    worst, largest = 0.0, 0.0
    for row in range(rows):
        exact, _ = attend(q[row].double(), *layer.dense(row), scale)
        worst = max(worst, float((out[row] - exact).abs().max()))
        largest = max(largest, float(exact.abs().max()))
    return {"largest": worst, "relative": worst / largest}


def microseconds(
    pair: tuple[str, str], megabytes: int, shape: Shape | None = None
) -> dict[str, float]:
    """Time one layer's attention; returns microseconds and the bytes that it reads."""
    programs = shape.programs if shape else None
    rows = BATCH * KV_HEADS
    tokens = int(megabytes * 1e6) // (rows * 4 * HEAD_DIM)
    runs = paged.uniform(rows, tokens, *pair)
    layers = [paged.make_layer(runs, rows, GROUP, HEAD_DIM, programs)]
    more = min(paged.copies(layers[0].payload_bytes), 8) - 1
    layers += [paged.make_layer(runs, rows, GROUP, HEAD_DIM, programs) for _ in range(more)]
    seconds = paged.time_s(paged.attention_calls(layers, shape))
    return {"us": round(1e6 * seconds, 2), "mb": round(layers[0].payload_bytes / 1e6, 2)}


def kernels(found: Found, arguments: argparse.Namespace) -> None:
    """Errors of every pair, then times; ratios are to bf16 over the same tokens."""
    tiny, only = arguments.tiny, arguments.only
    for name, pair in PAIRS.items():
        if found.is_over() or (only and name not in ("bf16", *only)):
            continue
        shapes = [(64, 100)] if tiny else [(width, 3000) for width in arguments.head_dims]
        errors = {
            str(head_dim): found.attempt(
                f"error of {name}, {head_dim}", lambda p=pair, d=head_dim, t=tokens: error(p, d, t)
            )
            for head_dim, tokens in shapes
        }
        times: dict[str, Any] = {}
        found.figures["kernels"][name] = {"error": errors, "times": times}
        found.write()
        for megabytes in () if tiny else arguments.sizes:
            with alone(arguments.lock):
                times[str(megabytes)] = found.attempt(
                    f"time of {name}, {megabytes} MB",
                    lambda p=pair, m=megabytes: microseconds(p, m),
                )
            bf16 = found.figures["kernels"].get("bf16", {}).get("times", times)[str(megabytes)]
            if times[str(megabytes)] and bf16:
                speed = bf16["us"] / times[str(megabytes)]["us"]
                times[str(megabytes)]["times as fast as bf16"] = round(speed, 2)
            torch.cuda.empty_cache()
        found.write()


@contextmanager
def alone(lock: Path | None) -> Iterator[None]:
    """While no other process times anything, of those that were given the same file."""
    if lock is None:
        yield
        return
    with lock.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        yield


def tuned(found: Found, arguments: argparse.Namespace) -> None:
    """Times of pairs by the kernel's shape; ``inf`` where one does not run."""
    tiny, names = arguments.tiny, arguments.only or TUNED
    sizes = (1,) if tiny else (256, 512)
    table = found.figures["tuned"] = {}
    for name in ("bf16", *names):
        times = table.setdefault(name, {})
        for shape in TRIED if name != "bf16" else TRIED[:1]:
            if found.is_over():
                continue
            case = f"{name}, {shape}"
            some = [
                found.attempt(case, lambda m=m, s=shape, n=name: timed(n, m, s, tiny))
                for m in sizes
            ]
            times[str(shape)] = [each["us"] if each else math.inf for each in some]
            torch.cuda.empty_cache()
            found.write()


def timed(name: str, megabytes: int, shape: Shape, tiny: bool) -> dict[str, float]:
    """``microseconds``, or one where nothing can be timed."""
    return {"us": 1.0} if tiny else microseconds(PAIRS[name], megabytes, shape)


def options() -> dict[str, Option]:
    """All tokens in every pair of formats, and behind what is done to keys before."""
    found = {name: Option(Full(), ALL, *pair) for name, pair in stored().items()}
    two, sinks = TurboQuant2(), {"exact_first": 4}
    for name, keys, values in (
        ("weighted, allocated 2 / 2 rotated", Allocated(), _rotated(2.0)),
        ("weighted, allocated 2.125 / 2 rotated", Allocated(mean_bits=2.125), _rotated(2.0)),
        ("weighted, allocated 2.25 / 2 rotated", Allocated(mean_bits=2.25), _rotated(2.0)),
        ("weighted, allocated 3 / 3 rotated", Allocated(mean_bits=3.0), _rotated(3.0)),
        ("weighted, allocated 2.125 / turboquant2", Allocated(mean_bits=2.125), two),
        ("weighted, fitted 1.8 / turboquant2", Fitted(), two),
        ("weighted, rotated_int2+4", RotatedInt2(**sinks), RotatedInt2(**sinks)),
    ):
        found[name] = Option(WeightedKeys(), ALL, keys, values)
    pair = Allocated(mean_bits=2.25), _rotated(2.0)
    found["allocated 2.25 / 2 rotated"] = Option(Full(), ALL, *pair)
    found["allocated 2 rotated / 2 rotated"] = Option(Full(), ALL, _rotated(2.0), _rotated(2.0))
    recent = "recent weighted, allocated 2.25 / 2 rotated"
    found[recent] = Option(WeightedKeys(queries="recent"), ALL, *pair)
    found["allocated 2.125 / turboquant2"] = Option(Full(), ALL, Allocated(mean_bits=2.125), two)
    grouped = RotatedInt2(group=128)
    found["oscar, 4 sinks"] = Option(Oscar(), ALL, grouped, grouped)
    found["oscar, 4 sinks and 32 recent"] = Option(Oscar(recent=32), ALL, grouped, grouped)
    found["oscar / turboquant2"] = Option(Oscar(), ALL, two, two)
    return found


def _rotated(mean_bits: float) -> Allocated:
    return Allocated(mean_bits=mean_bits, directions="hadamard")


def stored() -> dict[str, tuple[Format, Format]]:
    """Every registered format as it is published, and pairs and sinks that a search may choose."""
    alike = [kind() for kind in formats().values() if kind.bits < 16]
    sinks_matter = (Int4, Int2, RotatedInt4, RotatedInt2, TurboQuant2, Kitty, Kivi, Hqq2)
    alike += [kind(exact_first=4) for kind in sinks_matter]
    alike += [Int2(keys_by="token"), RotatedInt2(keys_by="channel"), RotatedInt2(clip=1.0)]
    pairs = {
        form.label + (" unclipped" if form == alike[-1] else ""): (form, form) for form in alike
    }
    sinks = {"exact_first": 4}
    pairs["rotated_int4+4 / rotated_int2+4"] = (RotatedInt4(**sinks), RotatedInt2(**sinks))
    pairs["int4+4 / rotated_int2+4"] = (Int4(**sinks), RotatedInt2(**sinks))
    at_228 = {"turboquant3+4 / turboquant1+4": (TurboQuant3(**sinks), TurboQuant1(**sinks))}
    at_228["turboquant3 / turboquant1"] = (TurboQuant3(), TurboQuant1())
    at_228["kitty, groups of 128"] = (Kitty(group=128, boosted=0.0625), Kitty(group=128))
    pairs |= at_228
    pairs["int2+4 / rotated_int2+4"] = (Int2(**sinks), RotatedInt2(**sinks))
    for form in (Q8(rotation="hadamard"), Q4(rotation="hadamard")):  # as llama.cpp has them now
        pairs[form.label] = (form, form)
    return pairs


def live(found: Found, arguments: argparse.Namespace) -> None:
    """Every option on one sample after another, those of few bits first in each."""
    tiny, only = arguments.tiny, arguments.only
    loaded = load_model("smollm2-135m", device=arguments.device, dtype="float32")
    shape = loaded.geometry
    counts = {"evaluate": dict.fromkeys(KINDS[: 1 if tiny else 3], 1 if tiny else arguments.each)}
    length = 200 if tiny else arguments.tokens
    samples = build(Workload(counts, tokens=length, observed=length // 8), loaded.tokenizer)
    asked = dict(list(options().items())[-9 if tiny else 0 :])
    asked = {name: asked[name] for name in only} if only else asked
    if any(isinstance(option.method, Oscar) for option in asked.values()):
        fit = build(replace(WORKLOAD, counts=TINY) if tiny else WORKLOAD, loaded.tokenizer)
        keep_learned(loaded.fingerprint, rotations(loaded, fit))
    policies = {
        name: Policy.uniform(option, shape.layers, shape.kv_heads) for name, option in asked.items()
    }
    needs = union_of_needs(policies.values())
    kl: dict[str, list[tuple[str, float]]] = {name: [] for name in policies}
    taken: dict[str, float] = {}
    full = 2 * 2 * shape.head_dim * shape.layers * shape.kv_heads
    by_turns = sorted(
        range(len(samples)), key=lambda n: [s.kind for s in samples[:n]].count(samples[n].kind)
    )
    for number in by_turns:
        sample = samples[number]
        if found.is_over():
            break
        prompt = fresh_prompt(loaded, sample, needs)
        names = list(policies)
        for start in range(0, len(names), TOGETHER):
            some = names[start : start + TOGETHER]
            together = [policies[name] for name in some]
            runs = found.attempt(
                f"live {some}", lambda a=together, p=prompt, s=sample: run_live(loaded, s, p, a)
            )
            for name, run in zip(some, runs or (), strict=False):
                kl[name].append((sample.kind, float(run.kl.mean())))
                taken[name] = 16 * run.footprint_bytes / (full * sample.prompt)
        report(found, kl, taken)


def report(found: Found, kl: dict[str, list[tuple[str, float]]], taken: dict[str, float]) -> None:
    for name, values in kl.items():
        if values:
            kinds = [kind for kind, _ in values]
            mean = estimate([value for _, value in values], kinds, "live")
            found.figures["live"][name] = {
                "bits an element": round(taken[name], 3),
                "KL": round(mean.value, 5), "low": round(mean.low, 5), "high": round(mean.high, 5),
                "samples": len(values), **_times(kl.get(BASE, []), values),
            } | {kind: [round(v, 5) for k, v in values if k == kind] for kind in kinds}  # fmt: skip
    found.write()


def _times(base: list[tuple[str, float]], values: list[tuple[str, float]]) -> dict[str, Any]:
    """How many times a format's loss plain two bits lose on the same samples."""
    if len(base) != len(values):
        return {}
    kinds, theirs = zip(*base, strict=True)
    ratio, low, high = ratio_interval(theirs, [value for _, value in values], kinds)
    return {"times": round(ratio, 3), "times_interval": [round(low, 3), round(high, 3)]}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seconds", type=float, default=240, help="after which no sample is begun")
    parser.add_argument("--tiny", action="store_true", help="small shapes, no times")
    parser.add_argument("--tune", action="store_true", help="shapes of the kernel alone")
    parser.add_argument("--live", action="store_true", help="what formats lose alone")
    parser.add_argument("--kernels", action="store_true", help="errors and times alone")
    parser.add_argument("--only", nargs="+", help="names of formats, instead of all")
    parser.add_argument("--head-dims", type=int, nargs="+", default=(64, 128), help="of errors")
    parser.add_argument("--lock", type=Path, help="a file by which processes time one at a time")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES_MB, help="MB that bf16 takes")
    parser.add_argument("--tokens", type=int, default=2048, help="of a sample, an eighth observed")
    parser.add_argument("--each", type=int, default=12, help="samples of each kind of text")
    arguments = parser.parse_args()
    parts = [name for name in ("kernels", "live") if getattr(arguments, name)]
    parts = parts or ["kernels", "live"]
    found = Found(arguments.out, arguments.seconds, *(() if arguments.tune else parts))
    if arguments.tune:
        found.attempt("tuned", lambda: tuned(found, arguments))
        found.write()
        return
    if "kernels" in parts:
        found.attempt("kernels", lambda: kernels(found, arguments))
    if "live" in parts:
        found.attempt("live", lambda: live(found, arguments))
    found.write()


if __name__ == "__main__":
    main()
