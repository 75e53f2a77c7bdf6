r"""How many keys an index compares to find the 100 that a query looks at most, on captured queries.

    python benchmarks/index_scan.py --out benchmarks/results/index-scan-2-h200.json [--seconds 150]
    python benchmarks/index_scan.py --device cpu --model smollm2-135m --faiss --seconds 1500 \
        --captured queries.npz --out benchmarks/results/index-scan-faiss-cpu.json     # faiss-cpu
    python benchmarks/index_scan.py --device cpu --tiny --out FILE     # that it runs

Queries and keys are those of a held-out needle sample as long as the model takes: 8k tokens of
SmolLM2, 32k of Gemma 3 270M, of some layers that attend to everything; the first 128 and last 512
keys are read anyway and are in no index. One index a query head, asked by the queries of the 128
tokens behind the prompt. ``lists``: what clusters of the prompt's queries look at, and neighbours;
``graph of turned queries`` and ``graph of queries``: RoarGraph's, of the prompt's queries turned to
where later ones stand, and as they were asked; ``graph of keys``: a plain index;
``codes``: keys in a few bits, then the likely ones in more and the best whole, where ``scanned`` is
the bytes of all that over those of all keys in 16 bits. ``recall`` of the
100 largest products, ``attention``, the share of what the 100 would give, and ``scanned``, the
share of keys compared, centres counted as keys, are means over heads and queries. ``least`` is the
smallest share that reaches a recall of 0.95, ``at_5_percent`` the recall there, between rows.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from recorded_parts import attempt, say
from torch import Tensor

from kvtune.common.rotary import turn
from kvtune.policies.code_index import PASSES, CodeIndex
from kvtune.policies.key_graph import KeyGraph
from kvtune.policies.query_index import QueryIndex
from kvtune.traces.models import LoadedModel, load_model
from kvtune.traces.seam import attending, causal_attention
from kvtune.traces.workloads import Workload, build

FIRST, LAST, TOP, WANTED, OBSERVED = 128, 512, 100, 0.95, 128
SHARES = (0.01, 0.02, 0.03, 0.05, 0.08, 0.12, 0.2)
CODE_SHARES = [0.03, 0.04, 0.05, 0.08]
EXPANSIONS = (8, 16, 32, 64, 100)
KEYS_A_CLUSTER = 20
MODELS = {"smollm2-135m": (8192, (5, 10, 18, 28)), "gemma-3-270m": (32768, (5, 11, 17))}

Found = Iterator[tuple[float, Tensor, Tensor]]
"""Of one head: a setting, the keys found ``[q, w]`` and those compared ``[q, n]``, or their count
``[q]``."""


@dataclass(frozen=True)
class Head:
    """One query head: keys, the prompt's queries as asked and turned, and those that come later."""

    name: str
    keys: Tensor
    before: Tensor
    turned: Tensor
    later: Tensor
    scale: float


def captured(
    name: str, device: str, tokens: int, layers: tuple[int, ...], file: Path | None = None
) -> list[Head]:
    """Every query head of some layers, from one pass over a sample, or from a file of it."""
    loaded = load_model(name, device=device)
    if file is not None and file.exists():
        with np.load(file) as arrays:
            kept = {key: torch.from_numpy(value).to(device) for key, value in arrays.items()}
    else:
        kept = observed(loaded, device, tokens, layers)
        if file is not None:
            np.savez(file, **{key: value.cpu().numpy() for key, value in kept.items()})
    heads = []
    for layer in (int(key[1:]) for key in kept if key[0] == "k"):
        q, k, later = (kept[f"{kind}{layer}"] for kind in "qkf")
        rope, prompt = loaded.geometry.rope_at(layer), q.shape[1]
        behind = prompt + OBSERVED // 2 - torch.arange(prompt, device=device)
        turned = q if rope is None else turn(q, behind, rope)
        group, last = len(q) // len(k), min(LAST, prompt // 8)
        for head in range(len(q)):
            keys = k[head // group, FIRST : prompt - last]
            about = f"layer {layer}, head {head}", keys, q[head], turned[head], later[head]
            heads.append(Head(*about, loaded.geometry.scale))
    return heads


@torch.no_grad()
def observed(
    loaded: LoadedModel, device: str, tokens: int, layers: tuple[int, ...]
) -> dict[str, Tensor]:
    """Of each layer the prompt's keys ``k`` and queries ``q``, and later queries ``f``."""
    plan = Workload({"evaluate": {"retrieval": 1}}, tokens=tokens, observed=OBSERVED)
    sample = build(plan, loaded.tokenizer)[0]
    seen: dict[str, Tensor] = {}

    def keep(
        layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None
    ) -> Tensor:
        if layer in layers and (window is None or window >= tokens):
            seen[f"k{layer}"] = k[0, :, : sample.prompt].float()
            seen[f"q{layer}"] = q[0, :, : sample.prompt].float()
            seen[f"f{layer}"] = q[0, :, sample.prompt :].float()
        return causal_attention(q, k, v, scale, window).to(q.dtype)

    with attending(keep):
        loaded.model(
            input_ids=torch.tensor([sample.token_ids], device=device),
            use_cache=False, logits_to_keep=1,
        )  # fmt: skip
    return seen


def into(heads: list[Head], *asked: Any) -> int:
    """Capture heads into a list; how many."""
    heads.extend(captured(*asked))
    return len(heads)


def lists(head: Head) -> Found:
    """Clusters of queries, their lists and neighbours, at several numbers of keys compared."""
    n = len(head.keys)
    most = int(SHARES[-1] * n)
    index = QueryIndex.build(head.keys, head.turned, max(n // KEYS_A_CLUSTER, 1), TOP, most, 16)
    for share in SHARES:
        if (most := int(share * n) - index.centres_compared) >= TOP:
            ids, visited = index.search(head.later, TOP, most)
            yield share, ids, visited.sum(-1) + index.centres_compared


def codes(choices: Sequence[Sequence[int]], head: Head) -> Found:
    """Keys in a few bits, pass by pass; ``compared`` counts bytes, 16 bits of a key's numbers."""
    n, whole = len(head.keys), 2 * head.keys.shape[1]
    for share in CODE_SHARES:
        compared = int(share * n)
        index = CodeIndex.build(head.keys, head.turned, TOP, compared, choices)
        if index.ranked(compared)[-1] >= TOP:
            ids = index.search(head.later, TOP, compared)
            read = torch.full((len(ids),), index.bytes_read(compared) / whole)
            yield share, ids, read.to(ids.device)


def graph(asked: Literal["turned", "before"], joins: Any, degree: int, head: Head) -> Found:
    """A graph of keys, at several numbers of expansions."""
    found = KeyGraph.build(head.keys, getattr(head, asked), degree, TOP, TOP, joins)
    for count in EXPANSIONS:
        ids, visited = found.search(head.later, TOP, count)
        yield count, ids, visited.sum(-1)


def faiss_graph(head: Head) -> Found:
    """FAISS's HNSW graph of the keys, at several widths of its search."""
    import faiss

    found = faiss.IndexHNSWFlat(head.keys.shape[1], 32, faiss.METRIC_INNER_PRODUCT)
    found.hnsw.efConstruction = TOP
    found.add(head.keys.cpu().numpy())
    for width in (100, 200, 400, 800):
        found.hnsw.efSearch = width
        yield width, *_faiss_asked(found, head, faiss.cvar.hnsw_stats)


def faiss_cells(head: Head) -> Found:
    """FAISS's inverted file of the keys, at several numbers of cells; centres count as keys."""
    import faiss

    size, cells = head.keys.shape[1], 64
    found = faiss.IndexIVFFlat(faiss.IndexFlatIP(size), size, cells, faiss.METRIC_INNER_PRODUCT)
    found.train(head.keys.cpu().numpy())
    found.add(head.keys.cpu().numpy())
    for probed in (1, 2, 4, 8, 16, 32):
        found.nprobe = probed
        ids, compared = _faiss_asked(found, head, faiss.cvar.indexIVF_stats)
        yield probed, ids, compared + cells


def _faiss_asked(index: Any, head: Head, counts: Any) -> tuple[Tensor, Tensor]:
    """Keys found ``[q, TOP]``, and the mean number compared, ``[q]``."""
    counts.reset()
    _, ids = index.search(head.later.cpu().numpy(), TOP)
    compared = torch.full((len(ids),), counts.ndis / len(ids))
    return torch.from_numpy(ids).to(head.keys.device), compared.to(head.keys.device)


FAISS: dict[str, Callable[[Head], Found]] = {
    "FAISS, HNSW of keys": faiss_graph,
    "FAISS, inverted file of keys": faiss_cells,
}
WAYS: dict[str, Callable[[Head], Found]] = {
    "lists": lists,
    "codes": partial(codes, PASSES),
    "codes of 1, 6 and 20 bytes": partial(codes, [(1, 6, 20)]),
    "codes of 2, 6 and 20 bytes": partial(codes, [(2, 6, 20)]),
    "codes of 2 and 16 bytes": partial(codes, [(2, 16)]),
    "codes of 3 bytes": partial(codes, [(3,)]),
    "graph of turned queries, degree 35": partial(graph, "turned", "queries", 35),
    "graph of queries, degree 35": partial(graph, "before", "queries", 35),
    "graph of keys, degree 16": partial(graph, "before", "keys", 16),
    "graph of turned queries, degree 16": partial(graph, "turned", "queries", 16),
}


def measured(heads: list[Head], way: Callable[[Head], Found], until: float) -> dict[str, Any]:
    """Recall and share compared at each setting, over the heads that there is time for."""
    found: dict[float, list[tuple[float, float, float]]] = {}
    begun, done = time.monotonic(), []
    for head in heads:
        if time.monotonic() > until:
            break
        logits = head.later @ head.keys.T
        best = logits.topk(TOP)
        weights = (head.scale * (logits - best.values[:, :1])).exp()
        most = weights.gather(1, best.indices).sum(-1)
        for setting, ids, compared in way(head):
            hit = (ids[:, :, None] == best.indices[:, None]).any(1).float().mean()
            got = weights.gather(1, ids.clamp_min(0)).where(ids >= 0, 0).sum(-1) / most
            scanned = compared.float().mean() / len(head.keys)
            found.setdefault(setting, []).append((float(hit), float(got.mean()), float(scanned)))
        done.append(head.name)
    rows = []
    for setting, each in found.items():
        recall, attention, scanned = (float(x) for x in np.mean(each, 0))
        rows.append(
            {
                "setting": setting, "recall": recall, "attention": attention, "scanned": scanned,
                "recall_of_heads": [round(hit, 3) for hit, _, _ in each],
            }
        )  # fmt: skip
    recalls, scans = ([row[name] for row in rows] for name in ("recall", "scanned"))
    reached = [s for r, s in zip(recalls, scans, strict=True) if r >= WANTED]
    inside = bool(scans) and min(scans) <= 0.05 <= max(scans) + 5e-4  # whole keys alone are read
    answer = {
        "keys": len(heads[0].keys), "heads": done, "rows": rows,
        "at_5_percent": float(np.interp(0.05, scans, recalls)) if inside else None,
        "least": min(reached) if reached else None, "seconds": time.monotonic() - begun,
    }  # fmt: skip
    say({key: answer[key] for key in ("keys", "at_5_percent", "least", "seconds")})
    return answer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--seconds", type=float, default=150)
    parser.add_argument("--faiss", action="store_true", help="and its indices (faiss-cpu)")
    parser.add_argument("--only", help="the way of this name, or those whose name holds it")
    parser.add_argument("--shares", default="", help="of codes, some of the shares in percent: 5,8")
    parser.add_argument("--captured", type=Path, help="read from there, or written there (.npz)")
    parser.add_argument("--model", choices=MODELS, help="this one alone")
    given = parser.parse_args()
    begun = time.monotonic()
    found: dict[str, Any] = {"torch": torch.__version__, "device": given.device}

    def record(name: str, part: Any) -> None:
        found[name] = part
        given.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")

    models = {"smollm2-135m": (1500, (10,))} if given.tiny else MODELS
    if given.model:
        models = {given.model: MODELS[given.model]}
    ways = FAISS | WAYS if given.faiss else WAYS
    if given.only in ways:
        ways = {given.only: ways[given.only]}
    ways = {name: way for name, way in ways.items() if (given.only or "") in name}
    if given.shares:
        CODE_SHARES[:] = [float(share) / 100 for share in given.shares.split(",")]
    ends = np.linspace(0, given.seconds, len(models) + 1)[1:]
    for (model, (tokens, layers)), end in zip(models.items(), ends, strict=True):
        heads: list[Head] = []

        attempt(
            record,
            f"{model}, heads captured",
            partial(into, heads, model, given.device, tokens, layers, given.captured),
        )
        if not heads:
            continue
        # As many heads as each way has time for, the layers in turn.
        mixed = [head for at in range(3) for head in heads[at::3]]
        for at, (name, way) in enumerate(ways.items()):
            left = begun + end - time.monotonic()
            until = time.monotonic() + left / (len(ways) - at)
            attempt(
                record,
                f"{model}, {name}",
                lambda h=mixed, w=way, u=until: measured(h, w, u),
            )


if __name__ == "__main__":
    main()
