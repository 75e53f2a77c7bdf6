"""Caches used again instead of a prefill: what is lost, and what time to first token is saved.

    python benchmarks/reuse.py --out benchmarks/results/reuse-h200.json [--seconds 180]

``quality`` runs SmolLM2-135M on generated tasks of several documents: needles hidden in a haystack
that is cut into a prefix and ``DOCUMENTS`` documents, each cached apart; the questions are then
asked. Held against the prefill of the whole prompt: the divergence at the questions' tokens, and
the share of answer digits that are right. ``apart`` only turns keys to their places (nothing is run
anew); ``shortened`` leaves the tokens out that the model itself foresees best, a surrogate for
LLMLingua-2; ``edited`` replaces tokens in the middle of the prompt and is held against a prefill
of what it says then (PIE), beside the same without turning keys (``spliced``). ``times`` is
what a question waits for its first answer token on models of random weights of Llama's shapes (1B:
16 layers of 2048 channels; 8B: 32 of 4096), 8192 tokens of documents and 64 of a question, which
every way runs in one pass with what it computes; ``saved`` is the share of the wait behind a full
prefill, documents and question in one pass. Caches are in device memory: loading them is not
timed. ``decoding`` feeds the questions' tokens to KVShare's cache one by one, as while an answer is
generated, with its second stage (three waiting tokens run anew with each) and without, and times
such a step. ``--parts`` runs some of these; ``--device cpu --tiny`` shows that it runs to its end;
``--work`` counts operations instead of timing, on a CPU.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from formats import Found
from torch import Tensor

from kvtune.runtime.reuse.blending import Rule, blended
from kvtune.runtime.reuse.editing import Edit, asked_edited, edited
from kvtune.runtime.reuse.parallel import ParallelContexts
from kvtune.runtime.reuse.passes import PromptCache, encoded, joined, part_of, placed
from kvtune.runtime.reuse.refreshing import A_STEP, Refreshing
from kvtune.runtime.reuse.shortening import shortened
from kvtune.traces.models import LoadedModel, load_model, wrap
from kvtune.traces.passes import full_cache_handler, prompt_cache, run_observed
from kvtune.traces.samples import Sample
from kvtune.traces.seam import causal_attention
from kvtune.traces.workloads import Workload, build
from kvtune.tuner.quality import estimate

DOCUMENTS, PREFIX, EDITED = 6, 64, 16
SHARES = (0.05, 0.15, 0.3)
RULES: tuple[Rule, ...] = ("cacheblend", "kvshare")
KEPT = (0.5, 0.33)
APE = ((1.0, 1.0), (0.9, 0.9), (0.8, 0.9))
TIMED, QUESTION = 8192, 64
SIZES = {"1B": (2048, 16), "8B": (4096, 32)}  # channels and layers
REPEATS = 5
PARTS = ("times", "quality", "decoding")
STAGES = {"kvshare 15%, first stage alone": 0, "kvshare 15%, both stages": A_STEP}
DECODED = 6  # samples whose tokens are fed one by one
STEPS = 12  # timed

Logits = Callable[[], Tensor]


def pieces(token_ids: Sequence[int]) -> list[list[int]]:
    """A prefix, and documents of equal length."""
    rest = list(token_ids[PREFIX:])
    size = -(-len(rest) // DOCUMENTS)
    return [list(token_ids[:PREFIX]), *(rest[at : at + size] for at in range(0, len(rest), size))]


def asked(loaded: LoadedModel, sample: Sample, cache: PromptCache) -> Tensor:
    """Logits of the questions behind a cache."""
    with torch.no_grad():
        return run_observed(
            loaded, sample.token_ids[sample.prompt :], sample.prompt, full_cache_handler(cache)
        )[0]


def ways(loaded: LoadedModel, sample: Sample) -> dict[str, Logits]:
    """Logits of the questions by each way to read the documents."""
    prompt = sample.token_ids[: sample.prompt]
    parts = pieces(prompt)
    with torch.no_grad():
        chunks = [prompt_cache(loaded, part) for part in parts]

    def by(rule: Rule, share: float) -> Tensor:
        rest = sample.token_ids[sample.prompt :]
        found = blended(loaded, prompt, chunks, share=share, rule=rule, question=rest).logits
        assert found is not None
        return found

    def ape(temperature: float, scale: float) -> Tensor:
        contexts = ParallelContexts.of(loaded, parts[0], parts[1:], temperature, scale)
        return contexts.logits(loaded, sample.token_ids[sample.prompt :])

    def apart() -> Tensor:
        return asked(loaded, sample, placed(loaded, chunks))

    def short(share: float) -> Tensor:
        fewer = shortened(loaded, prompt, share)
        with torch.no_grad():
            kept = prompt_cache(loaded, fewer)
            question = sample.token_ids[sample.prompt :]
            return run_observed(loaded, question, len(fewer), full_cache_handler(kept))[0]

    found: dict[str, Logits] = {"apart": apart}
    for rule in RULES:
        for share in SHARES:
            found[f"{rule} {share:.0%}"] = lambda r=rule, s=share: by(r, s)
    for share in KEPT:
        found[f"shortened to {share:.0%}"] = lambda s=share: short(s)
    for temperature, scale in APE:
        found[f"ape {temperature} {scale}"] = lambda t=temperature, s=scale: ape(t, s)
    return found


def editing(loaded: LoadedModel, sample: Sample) -> dict[str, tuple[Tensor, Tensor]]:
    """Exact logits after an edit, and those of an edited cache; with keys turned and not."""
    prompt = sample.token_ids[: sample.prompt]
    middle = len(prompt) // 2
    new = tuple(prompt[PREFIX : PREFIX + EDITED])  # words of the same text, at another place
    edit = Edit(middle, middle + EDITED // 2, new)
    with torch.no_grad():
        before = prompt_cache(loaded, prompt)
        exact = prompt_cache(loaded, edit.applied(prompt))
    front = part_of(before, slice(0, edit.start))
    spliced = [front, encoded(loaded, new, front), part_of(before, slice(edit.stop, len(prompt)))]
    moved_by = EDITED - EDITED // 2
    after = Sample(
        sample.id, sample.split, sample.kind, (*edit.applied(prompt),
        *sample.token_ids[sample.prompt :]), sample.next_token, sample.observed,
        sample.needle_of_row,
    )  # fmt: skip
    assert after.prompt == sample.prompt + moved_by
    theirs = asked(loaded, after, exact)
    return {
        "edited (PIE)": (theirs, asked(loaded, after, edited(loaded, before, [edit]))),
        "spliced": (theirs, asked(loaded, after, joined(spliced))),
    }


def divergence(exact: Tensor, ours: Tensor) -> float:
    """Mean Kullback-Leibler divergence, nats a token."""
    p, q = (x.float().log_softmax(-1) for x in (exact, ours))
    return float((p.exp() * (p - q)).sum(-1).mean())


def right(sample: Sample, logits: Tensor) -> float:
    """Share of answer digits that are the most probable token."""
    rows = [row for row, needle in enumerate(sample.needle_of_row) if needle >= 0]
    best = logits.argmax(-1).tolist()
    return sum(best[row] == sample.targets[row] for row in rows) / len(rows)


def quality(found: Found, device: str, tiny: bool) -> None:
    """Every way on one sample after another, until the time is up."""
    loaded = load_model("smollm2-135m", device=device, dtype="float32")
    length, observed, count = (400, 64, 1) if tiny else (2048, 256, 24)
    workload = Workload({"evaluate": {"retrieval": count}}, tokens=length, observed=observed)
    samples = build(workload, loaded.tokenizer)
    kl: dict[str, list[float]] = {}
    digits: dict[str, list[float]] = {}
    for sample in samples:
        if found.is_over():
            break
        with torch.no_grad():
            exact = asked(loaded, sample, prompt_cache(loaded, sample.token_ids[: sample.prompt]))
        digits.setdefault("full", []).append(right(sample, exact))
        some = {name: (exact, make) for name, make in ways(loaded, sample).items()}
        for name, (theirs, ours) in (found.attempt("edit", lambda s=sample: editing(loaded, s))
                                     or {}).items():  # fmt: skip
            some[name] = (theirs, lambda ours=ours: ours)
        for name, (theirs, make) in some.items():
            ours = found.attempt(name, make)
            if ours is not None:
                kl.setdefault(name, []).append(divergence(theirs, ours))
                digits.setdefault(name, []).append(right(sample, ours))
        report(found, kl, digits)


def report(
    found: Found, kl: dict[str, list[float]], digits: dict[str, list[float]], part: str = "quality"
) -> None:
    for name, shares in digits.items():
        row: dict[str, Any] = {"digits right": round(statistics.mean(shares), 4)}
        row["samples"] = len(shares)
        if name in kl:
            mean = estimate(kl[name], ["retrieval"] * len(kl[name]), "live")
            row |= {
                "KL": round(mean.value, 5),
                "low": round(mean.low, 5),
                "high": round(mean.high, 5),
            }
        found.figures[part][name] = row
    found.write()


def decoding(found: Found, device: str, tiny: bool) -> None:
    """KVShare with and without its second stage, token by token; then what a step takes."""
    loaded = load_model("smollm2-135m", device=device, dtype="float32")
    length, observed, count = (400, 64, 1) if tiny else (2048, 256, DECODED)
    workload = Workload({"evaluate": {"retrieval": count}}, tokens=length, observed=observed)
    kl: dict[str, list[float]] = {}
    digits: dict[str, list[float]] = {}
    for sample in build(workload, loaded.tokenizer):
        if found.is_over():
            break
        prompt = sample.token_ids[: sample.prompt]
        with torch.no_grad():
            exact = asked(loaded, sample, prompt_cache(loaded, prompt))
            chunks = [prompt_cache(loaded, part) for part in pieces(prompt)]
        blend = blended(loaded, prompt, chunks, share=0.15, rule="kvshare")
        for name, a_step in STAGES.items():
            answering = Refreshing(loaded, blend, prompt, observed, a_step)
            rest = sample.token_ids[sample.prompt :]
            ours = torch.stack([answering.logits(token) for token in rest])
            kl.setdefault(name, []).append(divergence(exact, ours))
            digits.setdefault(name, []).append(right(sample, ours))
        report(found, kl, digits, "decoding")
    for size, shape in {"tiny": (64, 3)}.items() if tiny else SIZES.items():
        found.figures["decoding"][f"{size}, a step, ms"] = found.attempt(
            f"steps of {size}", lambda s=shape: step_times(device, s, tiny)
        )
        found.write()


def step_times(device: str, shape: tuple[int, int], tiny: bool) -> dict[str, float]:
    """Median milliseconds of a step of an answer behind documents, by stages."""
    loaded, length = random_model(device, *shape), 400 if tiny else TIMED
    ids = torch.randint(2, 1000, (length,), generator=torch.Generator().manual_seed(0)).tolist()
    with torch.no_grad():
        chunks = [prompt_cache(loaded, part) for part in pieces(ids)]
    blend = blended(loaded, ids, chunks, share=0.15, rule="kvshare")
    times = {}
    for name, a_step in STAGES.items():
        answering = Refreshing(loaded, blend, ids, STEPS, a_step)
        seconds = median_s(lambda a=answering: a.logits(7), device, STEPS - 1)  # type: ignore[misc]
        times[name] = round(1e3 * seconds, 2)
    return times


def random_model(device: str, width: int, layers: int) -> LoadedModel:
    """A model of random weights, in bf16 but on a CPU."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    heads = 32 if width >= 2048 else 4
    config = LlamaConfig(
        hidden_size=width, intermediate_size=4 * width if width < 4096 else 14336,
        num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=heads // 4,
        head_dim=width // heads, vocab_size=1000, max_position_embeddings=16384,
        dtype=torch.float32 if device == "cpu" else torch.bfloat16,
    )  # fmt: skip
    before = torch.get_default_dtype()
    torch.set_default_dtype(config.dtype)
    try:
        with torch.device(device):
            model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    return wrap(model, None, name="random")


def times(found: Found, device: str, tiny: bool) -> None:
    """Seconds to the first token of an answer, by each way, the question's tokens included."""
    length = 400 if tiny else TIMED
    ids = torch.randint(2, 1000, (length,), generator=torch.Generator().manual_seed(0)).tolist()
    for size, shape in {"tiny": (64, 3)}.items() if tiny else SIZES.items():
        loaded = random_model(device, *shape)
        rows = found.figures["times"][size] = {
            "tokens": length, "question": QUESTION, "documents": DOCUMENTS,
        }  # fmt: skip
        for name, case in timed_ways(loaded, ids).items():
            seconds = found.attempt(f"time of {name}", lambda c=case: median_s(c, device))
            if seconds:
                row = rows[name] = {"first token, ms": round(1e3 * seconds, 2)}
                if "full prefill" in rows:
                    whole = rows["full prefill"]["first token, ms"]
                    row["saved"] = round(1 - row["first token, ms"] / whole, 3)
            found.write()
        del loaded


def timed_ways(
    loaded: LoadedModel, ids: list[int], asked_tokens: int = QUESTION
) -> dict[str, Callable[[], Any]]:
    """What runs when a question comes, by each way, to its first answer token."""
    parts, question, length = pieces(ids), ids[:asked_tokens], len(ids)
    with torch.no_grad():
        chunks = [prompt_cache(loaded, part) for part in parts]
        whole = prompt_cache(loaded, ids)
    contexts = ParallelContexts.of(loaded, parts[0], parts[1:])
    edit = Edit(length // 2, length // 2 + EDITED // 2, tuple(ids[:EDITED]))

    def ask(cache: PromptCache) -> None:
        tokens = cache[0][0].shape[2]
        with torch.no_grad():
            run_observed(loaded, question, tokens, full_cache_handler(cache))

    def prefill(tokens: Sequence[int]) -> PromptCache:
        """Prompt and question in one pass."""
        kept = PromptCache()

        def keep(
            layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None
        ) -> Tensor:
            kept.append((k, v))
            return causal_attention(q, k, v, scale, window)

        with torch.no_grad():
            run_observed(loaded, [*tokens, *question], 0, keep)
        return kept

    ways: dict[str, Callable[[], Any]] = {
        "full prefill": lambda: prefill(ids),
        "the same prompt again": lambda: ask(whole),
        "apart": lambda: ask(placed(loaded, chunks)),
        "ape": lambda: contexts.logits(loaded, question),
        "edited (PIE)": lambda: asked_edited(loaded, whole, [edit], question),
    }
    for rule in RULES:
        for share in SHARES:
            ways[f"{rule} {share:.0%}"] = lambda r=rule, s=share: blended(
                loaded, ids, chunks, share=s, rule=r, question=question
            )
    for share in KEPT:
        ways[f"shortened to {share:.0%}"] = lambda s=share: prefill(shortened(loaded, ids, s))
    return ways


def work(found: Found) -> None:
    """Operations of matrices, and seconds of processor, of the timed ways, by a model an eighth as
    wide over an eighth of the tokens: attention has the same share of the work."""
    from torch.utils.flop_counter import FlopCounterMode

    loaded, rows = random_model("cpu", width=256, layers=16), found.figures["work"]
    ids = torch.randint(2, 1000, (TIMED // 8,), generator=torch.Generator().manual_seed(0))
    rows["tokens"] = len(ids)
    for name, case in timed_ways(loaded, ids.tolist(), QUESTION // 8).items():
        case()
        counter, begun = FlopCounterMode(display=False), time.process_time()
        with counter:
            case()
        seconds = time.process_time() - begun
        operations = round(counter.get_total_flops() / 1e9, 2)
        row = rows[name] = {"matrices, 1e9": operations, "processor, s": round(seconds, 2)}
        if "full prefill" in rows:
            whole = rows["full prefill"]["processor, s"]
            row["saved"] = round(1 - row["processor, s"] / whole, 2)
        found.write()


def median_s(case: Callable[[], Any], device: str, repeats: int = REPEATS) -> float:
    """The median of some runs, after one that warms up."""
    seconds = []
    for _ in range(repeats + 1):
        wait(device)
        begun = time.perf_counter()
        case()
        wait(device)
        seconds.append(time.perf_counter() - begun)
    return statistics.median(seconds[1:])


def wait(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seconds", type=float, default=180, help="after which no sample is begun")
    parser.add_argument("--tiny", action="store_true", help="small shapes")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--work", action="store_true", help="count operations instead of timing")
    arguments = parser.parse_args()
    sections = ("work",) if arguments.work else tuple(arguments.parts)
    found = Found(arguments.out, arguments.seconds, *sections)
    if arguments.work:
        found.attempt("work", lambda: work(found))
        return
    for name, part in (("times", times), ("quality", quality), ("decoding", decoding)):
        if name in sections:
            found.attempt(name, lambda p=part: p(found, arguments.device, arguments.tiny))
    found.write()


if __name__ == "__main__":
    main()
