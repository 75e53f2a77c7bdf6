"""RetrievalAttention: each step searches an index over keys that was built for queries."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import TYPE_CHECKING, Literal

from kvtune.common.rotary import turn
from kvtune.policies.code_index import PASSES, CodeIndex
from kvtune.policies.key_graph import KeyGraph
from kvtune.policies.method import ReadingMethod
from kvtune.policies.plain_index import PlainIndex, require_faiss
from kvtune.policies.query_index import QueryIndex, centres_compared
from kvtune.policies.reader import Held, Memory, Reader
from kvtune.policies.recall import best, ends
from kvtune.policies.registry import LONGEST_PROMPT, parameter
from kvtune.policies.signals import ALL_QUERIES, Needs, Signals

if TYPE_CHECKING:
    from torch import Tensor

_NUMBER_BYTES, _KEY_BYTES = 4, 2
_LEVELS = 16  # of a direction in each pass of codes, for which room is reckoned
_KEYS_A_CLUSTER = 20  # of the lists' queries: lists are then those of queries that are much alike


Index = KeyGraph | QueryIndex | CodeIndex | PlainIndex


@dataclass(frozen=True)
class RetrievalAttention(ReadingMethod):
    """Holds every token; the budget is how many of them a step reads.

    graph   = of the tokens between the ends: keys that one prompt query looks at are joined
              (``joins: queries``), or keys near to each other (``joins: keys``, a plain index)
    found   = for each query of the head's group, the keys that a best-first search ends with
    read    = the first ``sinks`` and last ``recent`` tokens, and the largest logits found

    With ``joins: lists`` the index is kvtune's own: the prompt's queries, turned by their rotary
    positions to where later ones stand, are clustered, and each cluster lists the keys that its
    queries look at most; a search compares centres near its query and ``scanned`` of the keys, half
    of them from the nearest clusters' lists and half neighbours of the best.

    With ``joins: codes`` it is kvtune's too: keys in 1, 6 and 20 bytes (or others, where a sample
    of the prompt's queries finds more), cut by what turned queries ask of keys; a search ranks all
    by the first, some by the others, and compares whole keys with the rest of ``scanned`` of the
    keys' bytes.

    With ``joins: hnsw`` it is FAISS's HNSW graph of the keys (``pip install kvtune[index]``), which
    the host searches wherever the head lies.

    Source: Liu et al., "RetrievalAttention: Accelerating Long-Context LLM Inference via Vector
    Retrieval", arXiv 2409.10516, with the graph of RoarGraph, arXiv 2408.08933; 128 and 512 tokens
    that are always read, 35 neighbours in each of two steps and 100 keys a query are theirs.
    Differs: one graph a KV head, of all its group's queries, not a query head, and one list of
    tokens; a key's own lists are merged where several queries begin with it; the last step connects
    all keys at once. With ``tier: host`` keys, graph and search
    are the host's, as the authors' are; what was found comes over and is attended to on the device,
    where theirs stays.
    Cost: O(G P^2 D) and P searches once a prompt; ``beam`` expansions a step and query, of lists
    ``scanned`` P products.
    """

    name = "retrieval_attention"
    source = "Liu et al., arXiv 2409.10516"

    sinks: int = parameter(128, "first tokens always read", unit="tokens", low=0, high=4096)
    recent: int = parameter(
        512, "last tokens always read", unit="tokens", low=1, high=LONGEST_PROMPT
    )
    degree: int = parameter(35, "neighbours a key gets in each of two steps", low=1, high=128)
    near: int = parameter(100, "keys that a prompt query joins", low=2, high=1024)
    beam: int = parameter(100, "candidates of a search, and its most expansions", low=1, high=1024)
    joins: Literal["queries", "keys", "lists", "codes", "hnsw"] = parameter(
        "queries",
        "what joins keys: queries, keys as in a plain index, lists of clusters, codes, "
        "or FAISS's HNSW",
    )
    scanned: float = parameter(
        0.05, "share of the keys that a search of lists or codes compares", low=0.001, high=1
    )

    def __post_init__(self) -> None:
        """Refuse FAISS's index where there is no FAISS."""
        if self.joins == "hnsw":
            require_faiss()

    @property
    def needs(self) -> Needs:
        """Every query of the prompt, for the graph, and positions to turn them to."""
        return Needs() if self.joins == "hnsw" else Needs(window=ALL_QUERIES, rope=True)

    def reader(self, budget: int) -> IndexSearch:
        """A search for every query."""
        budget = max(budget, 1)
        at_ends = ends(budget, self.sinks, self.recent)
        return IndexSearch(
            budget, *at_ends, self.degree, self.near, self.beam, self.joins, self.scanned
        )


@dataclass(frozen=True)
class IndexSearch(Reader):
    """Reads what searches of an index find.

    Args:
        budget: entries read.
        first: at the start, always read.
        last: at the end, likewise.
        degree: neighbours a key gets in each of two steps.
        near: keys that a prompt query joins.
        beam: candidates of a search, and its most expansions.
        joins: what joins keys.
        scanned: share of the keys between the ends that a search of lists compares.
    """

    budget: int
    first: int
    last: int
    degree: int
    near: int
    beam: int
    joins: Literal["queries", "keys", "lists", "codes", "hnsw"]
    scanned: float

    def reads(self, held: Held, queries: Tensor) -> Tensor:
        """The ends, and the largest logits found."""
        return self._best(held, queries, self._indices(held))

    def follow(self, held: Held, query: Tensor, memory: Memory) -> Tensor:
        """The same by indices that are remembered."""
        if not memory:
            memory["indices"] = self._indices(held)
        return self._best(held, query, memory["indices"])[:, -1]

    def _indices(self, held: Held) -> list[tuple[int, Index | None]]:
        """Of each row the entries, and the index without its keys; None between ends that meet."""
        ends = self.first + self.last
        return [
            (count, self.index(held, row, count) if count > ends else None)
            for row, count in enumerate(held.counts.tolist())
        ]

    def _best(
        self, held: Held, queries: Tensor, indices: Sequence[tuple[int, Index | None]]
    ) -> Tensor:
        """The ends, and what searches of each row's index find, ``[R, C, n]`` bool."""
        import torch

        worth = queries.new_full(
            (len(queries), *queries.shape[2:3], held.keys.shape[1]), -torch.inf
        )
        for row, (count, index) in enumerate(indices):
            if index is not None:
                middle = slice(self.first, count - self.last)
                here = replace(index, keys=held.keys[row, middle].float())
                worth[row, :, middle] = self.found(here, queries[row]).amax(0)
        return best(held, worth, self.first, self.last, self.budget)

    def found(self, index: Index, queries: Tensor) -> Tensor:
        """Logits of the keys that the searches of one row end with, ``[G, C, middle]``.

        Minus infinity where a key was not found.
        """
        import torch

        asked = queries.flatten(0, 1)
        if isinstance(index, QueryIndex):
            most = self._listed(len(index.keys))
            ids, _ = index.search(asked, min(self.beam, most), most)
        elif isinstance(index, CodeIndex):
            ids = index.search(asked, self.beam, self._listed(len(index.keys)))
        elif isinstance(index, PlainIndex):
            ids = index.search(asked, self.beam)
        else:
            ids, _ = index.search(asked, self.beam)
        met = ids >= 0
        logits = torch.einsum("qd,qbd->qb", asked, index.keys[ids])
        worth = torch.full((len(asked), len(index.keys)), -torch.inf, device=asked.device)
        lowest = logits.masked_fill(~met, -torch.inf)
        worth = worth.scatter_reduce(1, ids.clamp_min(0), lowest, "amax")
        found: Tensor = worth.unflatten(0, queries.shape[:2])
        return found

    def index(self, held: Held, row: int, count: int) -> Index:
        """The index over the prompt's keys of one row, without these; built once a prompt.

        Those that a search compares are the keys as stored.
        """
        signals, head = held.signals, int(held.heads[row])
        middle = slice(self.first, count - self.last)
        tokens = held.tokens[row, middle]

        def without_keys() -> Index:
            keys = signals.keys[head, tokens].float()
            return replace(build(keys), keys=keys.new_empty(0, keys.shape[1]))

        def build(keys: Tensor) -> Index:
            if self.joins == "hnsw":
                return PlainIndex.build(keys, self.degree, self.near)
            queries = _queries_of(signals, head, turned=self.joins in ("lists", "codes"))
            if self.joins == "codes":
                return CodeIndex.build(keys, queries, self.beam, self._listed(len(keys)))
            if self.joins != "lists":
                return KeyGraph.build(keys, queries, self.degree, self.near, self.beam, self.joins)
            return QueryIndex.build(
                keys, queries, _clusters(len(keys)), self.near, self._listed(len(keys)), self.degree
            )

        which = blake2b(tokens.cpu().numpy().tobytes()).hexdigest()
        return signals.once(f"{self} {head} {which}", without_keys)

    def entries_read(self, entries: int) -> int:
        """Most entries that a step reads."""
        return min(entries, self.budget)

    def index_bytes(self, entries: int, head_dim: int) -> int:
        """Neighbours in 32 bits, and FAISS's copy of the keys; of lists, centres in 16 bits and
        keys with their shares in 32 too; of codes, what is packed, directions and levels."""
        middle = max(entries - self.first - self.last, 0)
        if self.joins == "codes":
            most = max(sum(choice) for choice in PASSES)
            return middle * most + head_dim * _KEY_BYTES * (head_dim + _LEVELS * len(PASSES[0]))
        if self.joins == "hnsw":  # the lowest layer's links, and a copy of the keys in 32 bits
            return middle * _NUMBER_BYTES * (2 * self.degree + head_dim)
        if self.joins != "lists":
            return middle * 2 * self.degree * _NUMBER_BYTES
        each = _KEY_BYTES * head_dim + 2 * _NUMBER_BYTES * self._listed(middle)
        return middle * self.degree * _NUMBER_BYTES + _clusters(middle) * each

    def scanned_bytes(self, entries: int, head_dim: int, key_bytes: int) -> int:
        """The most that one search compares: expanded keys' lists, and the keys on them.

        Searches of a group pass the same keys in part; one search is counted.
        """
        keys = self.compared_on_host(entries)
        if self.joins == "codes":
            return keys * head_dim * _KEY_BYTES
        if self.joins == "lists":
            return keys * (head_dim * _KEY_BYTES + 2 * _NUMBER_BYTES)
        expanded = min(self.beam, max(entries - self.first - self.last, 0))
        return expanded * 2 * self.degree * _NUMBER_BYTES + keys * head_dim * _KEY_BYTES

    def compared_on_host(self, entries: int) -> int:
        """The most keys that one search compares, and centres of lists; of codes, keys' worth."""
        middle = max(entries - self.first - self.last, 0)
        if self.joins == "codes":
            return self._listed(middle)
        if self.joins == "lists":
            return self._listed(middle) + centres_compared(_clusters(middle))
        return min(middle, min(self.beam, middle) * 2 * self.degree + 1)

    def _listed(self, middle: int) -> int:
        """Keys that a search of lists compares, at least one."""
        return max(round(self.scanned * middle), 1)


def _clusters(middle: int) -> int:
    """Of the queries that make lists over so many keys."""
    return max(middle // _KEYS_A_CLUSTER, 1)


def _queries_of(signals: Signals, head: int, turned: bool) -> Tensor:
    """The queries of one KV head's group at all positions, ``[G P, D]``.

    Turned behind the prompt they look at what later queries of the same content will.
    """
    import torch

    tokens = signals.prompt_tokens
    queries = signals.queries[:, -tokens:].float()
    if turned and signals.rope is not None:
        behind = tokens - torch.arange(tokens, device=queries.device)
        queries = turn(queries, behind, signals.rope)
    grouped: Tensor = queries.unflatten(0, (signals.keys.shape[0], -1))[head]
    return grouped.flatten(0, 1)
