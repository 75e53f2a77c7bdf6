"""Prompt caches on their way: what every level takes, loses and costs, and what a controller sends.

    python benchmarks/transport.py --out benchmarks/results/transport-h200.json [--seconds 150]

``levels`` encodes caches that SmolLM2-135M really made of prompts of prose, code and retrieval:
bits an element with all that travels, the ratio to eight bits (``int8``, 8.5 with its scales), the
divergence from the full cache at observed tokens, and the speed of coding on one CPU thread. Where
the coder (``constriction``) is not installed bits are an ideal coder's, and the row says so.
``controller`` sends a prompt of 8 chunks whose sizes are those of the released levels over 200
made-up bandwidth traces (0.1 to 10 Gbit/s, anew for every chunk, as the authors draw them), by the
published and the released rule, and holds both against sending one level always.
``--device cpu --tiny`` shows that it runs to its end. ``--speeds`` only encodes and decodes one
prompt of prose at every level, differences from anchors among them, with the real coder: its bytes
beside the least that any coder could take, and elements a second of processor time.

    python benchmarks/transport.py --speeds --device cpu --out transport-speeds-cpu.json
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from formats import Found
from torch import Tensor

from kvtune.policies.formats.grouped import Int4, Int8
from kvtune.runtime.reuse.passes import PromptCache
from kvtune.runtime.transport import codec
from kvtune.runtime.transport.codec import LEVELS, Encoded, Floats, Level
from kvtune.runtime.transport.symbols import least_bytes
from kvtune.simulator.latency.transport import Chunk, Rule, as_published, as_released, deliver
from kvtune.traces.models import LoadedModel, load_model
from kvtune.traces.passes import full_cache_handler, prompt_cache, run_observed
from kvtune.traces.samples import Sample
from kvtune.traces.workloads import Workload, build
from kvtune.tuner.quality import estimate

KINDS = ("prose", "code", "retrieval")
EIGHT_BITS = 8.5
TRIED = (
    *LEVELS,
    Level("finer", (64, 64, 64), (64, 64)),
    replace(LEVELS[0], name="fine, anchors", anchors=10),
)
CHUNKS, TRACES, CHUNK_TOKENS, LINE_TOKENS_PER_S = 8, 200, 1500, 8000.0
PLAIN = {"int8": Int8(), "int4": Int4()}


def planes(cache: PromptCache) -> tuple[Floats, Floats]:
    """Keys and values of all layers, ``[L, H, T, D]`` float32."""
    both = [torch.cat([pair[n] for pair in cache]).float().cpu().numpy() for n in (0, 1)]
    return both[0], both[1]


def tensors(keys: Floats, values: Floats, like: Tensor) -> PromptCache:
    pairs = zip(keys, values, strict=True)
    return [tuple(torch.from_numpy(x).to(like)[None] for x in pair) for pair in pairs]  # type: ignore[misc]


def coded(keys: Floats, values: Floats, level: Level) -> tuple[float, Floats, Floats, Any]:
    """Bits an element, what is read back, and the seconds of both ways where they are real."""
    if find_spec("constriction") is None:
        return ideally(keys, values, level)
    begun = time.perf_counter()
    encoded: Encoded = codec.encode(keys, values, level)
    middle = time.perf_counter()
    read = codec.decode(encoded)
    seconds = (middle - begun, time.perf_counter() - middle)
    return encoded.bits_an_element, *read, seconds


def ideally(keys: Floats, values: Floats, level: Level) -> tuple[float, Floats, Floats, None]:
    """The same without a coder: the symbols' least bytes, and what they stand for."""
    total, read = 0, []
    for role, tensor in (("keys", keys), ("values", values)):
        back = np.zeros_like(tensor)
        for layer in range(len(tensor)):
            if level.anchors:
                raise RuntimeError("anchors need the coder")
            size, back[layer] = _channels(tensor[layer], level.bins(role, layer, len(tensor)))
            total += size
        read.append(back)
    return 8 * total / (2 * keys.size), read[0], read[1], None


def _channels(tensor: Floats, bins: int) -> tuple[int, Floats]:
    heads, tokens, width = tensor.shape
    rows = tensor.transpose(1, 0, 2).reshape(tokens, -1)
    half = bins // 2 - 1
    most = np.abs(rows).max(1, keepdims=True).astype(np.float16).astype(np.float32)
    symbols = np.rint(rows * half / np.where(most > 0, most, 1)).clip(-half, half).astype(np.int32)
    size = least_bytes(symbols + half, 2 * half + 1) + 2 * tokens
    back = (symbols * (most / half)).reshape(tokens, heads, width)
    return size, back.transpose(1, 0, 2)


def divergence(loaded: LoadedModel, sample: Sample, exact: Tensor, cache: PromptCache) -> float:
    """Mean over observed tokens, nats."""
    p, q = (x.float().log_softmax(-1) for x in (exact, asked(loaded, sample, cache)))
    return float((p.exp() * (p - q)).sum(-1).mean())


def asked(loaded: LoadedModel, sample: Sample, cache: PromptCache) -> Tensor:
    with torch.no_grad():
        return run_observed(
            loaded, sample.token_ids[sample.prompt :], sample.prompt, full_cache_handler(cache)
        )[0]


def plain(cache: PromptCache, name: str) -> PromptCache:
    """A cache stored in a format of pages."""
    form, found = PLAIN[name], []
    for pair in cache:
        count = torch.full(pair[0].shape[:2], pair[0].shape[2])
        found.append(
            (form.roundtrip(pair[0], count.to(pair[0].device), "keys"),
             form.roundtrip(pair[1], count.to(pair[1].device), "values"))
        )  # fmt: skip
    return found


def levels(found: Found, device: str, tiny: bool) -> dict[str, float]:
    """Every level on one sample of each kind after another; returns bits an element by level."""
    loaded = load_model("smollm2-135m", device=device, dtype="float32")
    length, observed, count = (300, 32, 1) if tiny else (2048, 256, 6)
    kinds = KINDS[: 1 if tiny else 3]
    workload = Workload({"evaluate": dict.fromkeys(kinds, count)}, tokens=length, observed=observed)
    samples = build(workload, loaded.tokenizer)
    samples = sorted(samples, key=lambda each: int(each.id.rsplit("-", 1)[-1]))
    rows: dict[str, list[dict[str, Any]]] = {}
    for sample in samples:
        if found.is_over():
            break
        with torch.no_grad():
            cache = prompt_cache(loaded, sample.token_ids[: sample.prompt])
        exact, (keys, values) = asked(loaded, sample, cache), planes(cache)

        def run(level: Level) -> dict[str, Any]:
            bits, *read, seconds = coded(keys, values, level)  # noqa: B023
            kl = divergence(loaded, sample, exact, tensors(*read, like=cache[0][0]))  # type: ignore[arg-type]  # noqa: B023
            return {"bits": bits, "kl": kl, "seconds": seconds, "elements": 2 * keys.size}  # noqa: B023

        coded_here = find_spec("constriction") is not None
        for level in (each for each in TRIED if coded_here or not each.anchors):
            row = found.attempt(level.name, lambda x=level: run(x))
            if row:
                rows.setdefault(level.name, []).append(row | {"kind": sample.kind})
        for name in PLAIN:
            kl = divergence(loaded, sample, exact, plain(cache, name))
            bits = PLAIN[name].bits + 0.5
            rows.setdefault(name, []).append({"bits": bits, "kl": kl, "kind": sample.kind})
        report(found, rows)
    return {name: statistics.mean(r["bits"] for r in some) for name, some in rows.items()}


def report(found: Found, rows: dict[str, list[dict[str, Any]]]) -> None:
    for name, some in rows.items():
        mean = estimate([row["kl"] for row in some], [row["kind"] for row in some], "live")
        bits = statistics.mean(row["bits"] for row in some)
        found.figures["levels"][name] = {
            "bits an element": round(bits, 3),
            "smaller than int8": round(EIGHT_BITS / bits, 2),
            "KL": round(mean.value, 5), "low": round(mean.low, 5), "high": round(mean.high, 5),
            "samples": len(some),
        }  # fmt: skip
        timed = [row for row in some if row.get("seconds")]
        if timed:
            speeds = [
                statistics.median(row["elements"] / row["seconds"][way] / 1e6 for row in timed)
                for way in (0, 1)
            ]
            found.figures["levels"][name] |= {
                "encoded, million elements a second": round(speeds[0], 2),
                "decoded, million elements a second": round(speeds[1], 2),
            }
        elif "seconds" in some[0]:
            found.figures["levels"][name]["bits are of"] = "an ideal coder"
    found.write()


def speeds(found: Found, device: str, tiny: bool) -> None:
    """The real coder on one really captured cache, on one thread."""
    loaded = load_model("smollm2-135m", device=device, dtype="float32")
    workload = Workload({"evaluate": {"prose": 1}}, tokens=300 if tiny else 2048, observed=32)
    sample = build(workload, loaded.tokenizer)[0]
    with torch.no_grad():
        keys, values = planes(prompt_cache(loaded, sample.token_ids[: sample.prompt]))
    elements, exact = 2 * keys.size, (keys, values)
    for level in TRIED:
        begun = time.process_time()
        encoded = codec.encode(keys, values, level)
        middle = time.process_time()
        read = codec.decode(encoded)
        ended = time.process_time()
        error = sum(float(np.square(x - y).sum()) for x, y in zip(read, exact, strict=True))
        found.figures["speeds"][level.name] = {
            "bytes": encoded.nbytes,
            "bits an element": round(encoded.bits_an_element, 3),
            "least bits": None if level.anchors else round(ideally(keys, values, level)[0], 3),
            "squared error over the square": error / sum(float(np.square(x).sum()) for x in exact),
            "encoded, million elements a second": round(elements / (middle - begun) / 1e6, 2),
            "decoded, million elements a second": round(elements / (ended - middle) / 1e6, 2),
        }
        found.write()


def controller(found: Found, bits: dict[str, float]) -> None:
    """Both rules and every level alone over the same traces, for a model of 8B parameters."""
    elements = 2 * 32 * 8 * 128 * CHUNK_TOKENS
    sizes = {
        level.name: int(bits[level.name] * elements / 8) for level in LEVELS if level.name in bits
    }
    chunk = Chunk(sizes, 4 * CHUNK_TOKENS, CHUNK_TOKENS / LINE_TOKENS_PER_S, 0.02)
    rng = np.random.default_rng(0)
    traces = rng.uniform(0.1, 10, (TRACES, CHUNKS)) * 1e9 / 8
    rules: dict[str, Rule] = {"as published": as_published, "as released": as_released}
    for name in (*sizes, "text"):
        rules[f"always {name}"] = lambda chunks, state, allowed, n=name: n  # type: ignore[misc]
    for allowed in (0.5, 1.0, 2.0):
        table = found.figures["controller"][f"{allowed} s asked"] = {}
        for name, rule in rules.items():
            sent = [deliver([chunk] * CHUNKS, trace.tolist(), allowed, rule) for trace in traces]
            choices = [choice for one in sent for choice in one.choices]
            table[name] = {
                "in time": round(statistics.mean(one.within for one in sent), 3),
                "median s": round(statistics.median(one.ready_s for one in sent), 3),
                "MB": round(statistics.mean(one.sent_bytes for one in sent) / 1e6, 1),
                "shares": {c: round(choices.count(c) / len(choices), 2) for c in {*choices}},
            }
    found.write()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seconds", type=float, default=150, help="after which no sample is begun")
    parser.add_argument("--tiny", action="store_true", help="one short sample")
    parser.add_argument("--speeds", action="store_true", help="of the coder alone")
    arguments = parser.parse_args()
    if arguments.speeds:
        found = Found(arguments.out, arguments.seconds, "speeds")
        found.attempt("speeds", lambda: speeds(found, arguments.device, arguments.tiny))
        found.write()
        return
    found = Found(arguments.out, arguments.seconds, "levels", "controller")
    run: Callable[[], Any] = lambda: levels(found, arguments.device, arguments.tiny)  # noqa: E731
    bits = found.attempt("levels", run)
    if bits:
        found.attempt("controller", lambda: controller(found, bits))
    found.write()


if __name__ == "__main__":
    main()
