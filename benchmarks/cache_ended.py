"""A captured graph goes on rightly when one of its sequences has ended; a check only, no times.

    python benchmarks/cache_ended.py --out cache-ended.json [--tokens 100]

Packed buffers that a kernel reads in place (KIVI, Kitty, KVQuant, GEAR: one a KV head), pages of
every format beside settling tokens, and readers that choose pages. One of two sequences is freed in
the middle of the captured loop, and the bytes that it gives back are overwritten with 0xFF, which
no float reads as a number. The other one must then say, token for token, what it says beside a
sequence that goes on; every logit must stay finite; nothing may be written to what was given back.

On a GPU the loop must have been captured, or the check says so and fails. Without one, the kernels
run in Triton's interpreter (``TRITON_INTERPRET=1``, ``--prompt 80 --tokens 12``) step by step.
The exit code is 1 where anything fails.
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from cache_checks import DEVICE, KV_HEADS, LAYERS, Case, Prompts, mixed, models
from torch import Tensor

from kvtune.policies.formats.gear import Gear
from kvtune.policies.formats.kitty import Kitty
from kvtune.policies.formats.kivi import Kivi
from kvtune.policies.formats.kvquant import KvQuant
from kvtune.policies.methods.full import Full
from kvtune.policies.methods.quest import Quest
from kvtune.policies.option import ALL, Budget, Option
from kvtune.policies.page_formats import PAGE
from kvtune.policies.policy import Policy
from kvtune.runtime import load_cache
from kvtune.runtime.admission import read_prompts
from kvtune.runtime.cache import policy_cache as caches
from kvtune.runtime.cache.paged_layer import PagedLayer
from kvtune.runtime.cache.policy_cache import PolicyCache
from kvtune.runtime.cache.triton_backend import TritonBackend
from kvtune.runtime.graph import DecodeLoop

NO_NUMBER = 0xFF


def cases() -> dict[str, Case]:
    """The caches that are tried, by the name of what they hold."""
    forms = (Kivi(backbone="int4"), Kitty(), KvQuant(), Gear())
    packed = tuple(Option(Full(), ALL, form, form) for form in forms)
    chosen = Option(Quest(block=PAGE), Budget(tokens=PAGE))
    return {
        "packed rows": Case("llama", Policy("packed", (packed, packed[::-1])), {}),
        "pages of every format": Case("llama", mixed(), {"residual": 16}),
        "pages chosen": Case("llama", Policy.uniform(chosen, LAYERS, KV_HEADS), {}),
    }


class Likeliest:
    """Draws the likeliest token, and notes in place, as a graph can, which logits were finite."""

    def __init__(self, sequences: int) -> None:
        self.finite = torch.ones(sequences, dtype=torch.bool, device=DEVICE)

    def draw(self, logits: Tensor) -> Tensor:
        """Token ids ``[B]`` of logits ``[B, V]``."""
        self.finite.logical_and_(logits.isfinite().all(-1))
        return logits.argmax(-1)


@dataclass(frozen=True)
class Said:
    """What a loop has answered.

    Args:
        tokens: ``[2, n]``.
        finite: whether every logit of each sequence was a number.
        captured: whether a graph was replayed.
        given_back: bytes that the freed sequence gave back; 0 where none was.
        untouched: whether they are as they were overwritten.
    """

    tokens: Tensor
    finite: list[bool]
    captured: bool
    given_back: int = 0
    untouched: bool = True


def said(model: Any, case: Case, prompts: Prompts, freed: int | None = None) -> Said:
    """Answers of the loop, half of whose tokens come after a sequence was freed, where one is."""
    count = prompts.text.shape[1]
    with kernels():
        cache = load_cache(case.policy, model, new_tokens=count, **case.options)
        draws = Likeliest(len(prompts.ids))
        first = draws.draw(read_prompts(model, cache, prompts.ids, prompts.mask))
        loop = DecodeLoop(model, cache, first, prompts.mask.sum(1), count, draws)
        with loop.ready():
            captured = cache.captured
            loop.advance(count // 2 - loop.done)
            cache.reserve(count - loop.done)  # so that nobody needs what is given back
            cells = torch.zeros(0, dtype=torch.long, device=DEVICE)
            if freed is not None:
                cells = overwritten(cache, freed)
            loop.advance(count - loop.done)
    held = in_cells(cache)[cells]
    untouched = bool((held == NO_NUMBER).all())
    return Said(loop.found, draws.finite.tolist(), captured, held.numel(), untouched)


@contextmanager
def kernels() -> Iterator[None]:
    """Caches are worked on by kernels, also where they are interpreted."""
    chosen, caches.backend_for = caches.backend_for, lambda _: TritonBackend()
    try:
        yield
    finally:
        caches.backend_for = chosen


def overwritten(cache: PolicyCache, sequence: int) -> Tensor:
    """Free a sequence and overwrite what it gives back; the cells of that, int64 ``[n]``."""
    found = [cell for layer in cache.layers for cell in cells_of(layer.paged, sequence)]
    cache.free(sequence)
    cache.pool.check_integrity()
    cells = torch.tensor(found, device=DEVICE)
    in_cells(cache)[cells] = NO_NUMBER
    return cells


def cells_of(layer: PagedLayer, sequence: int) -> Iterator[int]:
    """Cells of a layer's pool that a sequence's rows hold."""
    heads = len(layer.options)
    rows = range(sequence * heads, (sequence + 1) * heads)
    for kind, by_row in enumerate(layer.pages):
        for row in rows:
            for first in by_row[row].tolist():
                yield from range(first, first + layer.layout(kind, row).page_cells)
    for part in layer.beside.laid if layer.beside else ():
        if part.part.row in rows:
            for first in part.laid.pages.tolist():
                yield from range(first, first + part.laid.layout.page_cells)


def in_cells(cache: PolicyCache) -> Tensor:
    """The pool's memory, ``[cells, bytes of a cell]``."""
    return cache.pool.memory.view(-1, cache.pool.cell_bytes)


def checked(model: Any, case: Case, prompts: Prompts) -> dict[str, Any]:
    """Each of two sequences ends in turn, beside a loop in which none does."""
    whole = said(model, case, prompts)
    found: dict[str, Any] = {"captured": whole.captured, "right": True}
    for freed, other in ((1, 0), (0, 1)):
        left = said(model, case, prompts, freed)
        alike = (left.tokens[other] == whole.tokens[other]).int().cumprod(0).sum()
        found[f"sequence {freed} ends"] = {
            "the other says the same for": int(alike), "of tokens": left.tokens.shape[1],
            "finite": left.finite, "bytes given back": left.given_back,
            "untouched": left.untouched,
        }  # fmt: skip
        right = int(alike) == left.tokens.shape[1] and all(left.finite) and left.untouched
        right = right and left.given_back > 0 and left.captured == (DEVICE == "cuda")
        found["right"] = found["right"] and right
    return found


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--prompt", type=int, default=300)
    parser.add_argument("--tokens", type=int, default=100)
    parser.add_argument("--cases", nargs="*", choices=list(cases()), default=list(cases()))
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    prompts, model = Prompts.drawn(arguments.prompt, arguments.tokens), models()["llama"]
    device = torch.cuda.get_device_name() if DEVICE == "cuda" else "interpreter"
    found: dict[str, Any] = {"device": device, "torch": torch.__version__}
    for name in arguments.cases:
        found[name] = checked(model, cases()[name], prompts)
        print(name, json.dumps(found[name]), flush=True)
        arguments.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    wrong = [name for name in arguments.cases if not found[name]["right"]]
    if wrong:
        raise SystemExit(f"wrong: {', '.join(wrong)}")


if __name__ == "__main__":
    main()
