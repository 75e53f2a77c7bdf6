"""A graph over keys that is searched for those of largest inner product with a query.

Queries of attention do not lie where keys do, so that neighbours among keys are a poor guide to
them. The graph of RoarGraph (Chen et al., VLDB 2024, arXiv 2408.08933) joins keys that the same
query looks at; neighbours among keys are kept for comparison. All rows work at once, in torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

NONE = -1
"""Fills up a list of neighbours."""

_AT_ONCE = 1024  # searches side by side: what they visited is a table of searches and keys


@dataclass(frozen=True, eq=False)
class KeyGraph:
    """Keys, their neighbours, and where searches begin.

    Args:
        keys: ``[n, D]`` float32.
        neighbours: ``[n, m]`` int64, each once; ``NONE`` where there are fewer.
        entry: the key nearest to the mean key.
    """

    keys: Tensor
    neighbours: Tensor
    entry: int

    @staticmethod
    def build(
        keys: Tensor,
        queries: Tensor,
        degree: int,
        near: int,
        beam: int,
        joins: Literal["queries", "keys"],
    ) -> KeyGraph:
        """Join keys, then whatever a search for each key passes on its way.

        Args:
            keys: ``[n, D]`` float32.
            queries: ``[m, D]``, of the prompt.
            degree: neighbours a key gets in each of the two steps, M.
            near: keys of largest product that each query joins.
            beam: width of the searches that connect the graph.
            joins: what joins keys: the queries that look at both, or their own product.
        """
        import torch

        asked = queries if joins == "queries" else keys
        pairs = _pruned(keys, *_joined(keys, asked, near), degree)
        first = _both_ways(keys, pairs, degree)
        entry = int((keys - keys.mean(0)).square().sum(-1).argmin())
        passed = KeyGraph(keys, first, entry)._passed(beam)
        second = _both_ways(keys, _pruned(keys, *passed, degree), degree)
        return KeyGraph(keys, _distinct(torch.cat([first, second], 1)), entry)

    def _passed(self, beam: int) -> tuple[Tensor, Tensor]:
        """Pairs of a key and another that the search for it compared."""
        import torch

        found = [self.search(some, beam)[1].nonzero() for some in self.keys.split(_AT_ONCE)]
        source = torch.cat([at * _AT_ONCE + pairs[:, 0] for at, pairs in enumerate(found)])
        return source, torch.cat([pairs[:, 1] for pairs in found])

    def search(
        self, queries: Tensor, beam: int, expansions: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Visit the neighbours of the best key not yet expanded, so many times at most.

        Args:
            queries: ``[q, D]``.
            beam: how many of the best keys stay candidates.
            expansions: the most; as many as candidates unless given.

        Returns:
            the candidates at the end, best first, ``[q, beam]`` (``NONE`` where fewer were met),
            and which keys were compared with each query, ``[q, n]`` bool.
        """
        import torch

        q, device = len(queries), queries.device
        row = torch.arange(q, device=device)
        visited = torch.zeros(q, len(self.keys) + 1, dtype=torch.bool, device=device)
        visited[:, NONE] = True  # the last column stands for no key
        ids = torch.full((q, beam), NONE, device=device)
        worth = torch.full((q, beam), -torch.inf, device=device)
        expanded = torch.zeros(q, beam, dtype=torch.bool, device=device)
        ids[:, 0], worth[:, 0] = self.entry, queries @ self.keys[self.entry]
        visited[:, self.entry] = True
        for _ in range(beam if expansions is None else expansions):
            open_ = worth.masked_fill(expanded, -torch.inf)
            best, at = open_.max(-1)
            if not bool((best > -torch.inf).any()):
                break
            expanded[row, at] = True
            met = self.neighbours[ids[row, at]].masked_fill((best == -torch.inf)[:, None], NONE)
            fresh = ~visited.gather(1, met % visited.shape[1])
            visited.scatter_(1, met % visited.shape[1], value=True)
            product = torch.einsum("qd,qmd->qm", queries, self.keys[met])
            worth = torch.cat([worth, product.masked_fill(~fresh, -torch.inf)], 1)
            ids = torch.cat([ids, met], 1)
            expanded = torch.cat([expanded, torch.zeros_like(fresh)], 1)
            worth, order = worth.topk(beam, -1)
            ids, expanded = ids.gather(1, order), expanded.gather(1, order)
        return ids.masked_fill(worth == -torch.inf, NONE), visited[:, :-1]


def _joined(keys: Tensor, asked: Tensor, near: int) -> tuple[Tensor, Tensor]:
    """Pairs of a query's best key and its next best ones; lists of one pivot are one list."""
    products = asked @ keys.T
    best = products.topk(min(near, len(keys)), -1).indices
    return best[:, :1].expand_as(best[:, 1:]).flatten(), best[:, 1:].flatten()


def _pruned(keys: Tensor, source: Tensor, target: Tensor, degree: int) -> Tensor:
    """At most ``degree`` targets of each source, ``[n, degree]``.

    By falling product with the source; one is passed over that is nearer to a kept one than to the
    source, and room that is left is filled with those passed over.
    """
    import torch

    lists = _lists(keys, source, target, 3 * degree)
    rows = torch.arange(len(keys), device=keys.device).split(_AT_ONCE)
    return torch.cat([_chosen(keys, at, lists[at], degree) for at in rows])


def _chosen(keys: Tensor, source: Tensor, lists: Tensor, degree: int) -> Tensor:
    """Those of ``lists`` ``[m, w]`` that their sources ``[m]`` keep, ``[m, degree]``."""
    import torch
    import torch.nn.functional as F

    targets, there = keys[lists], lists != NONE
    between = targets @ targets.transpose(-1, -2)
    nearer = between > (targets @ keys[source, :, None])  # [m, w, w]: to another than to the source
    kept = torch.zeros_like(there)
    count = torch.zeros(len(lists), dtype=torch.int64, device=keys.device)
    for at in range(lists.shape[1]):
        kept[:, at] = there[:, at] & (count < degree) & ~(nearer[:, at] & kept).any(-1)
        count += kept[:, at]
    order = (2 * ~there + ~kept).argsort(dim=-1, stable=True)[:, :degree]
    return F.pad(lists.gather(1, order), (0, degree - order.shape[1]), value=NONE)


def _lists(keys: Tensor, source: Tensor, target: Tensor, longest: int) -> Tensor:
    """Each source's targets by falling product, each once, ``[n, longest or fewer]``."""
    import torch

    n = len(keys)
    pairs = (source * n + target)[source != target].unique()
    source, target = pairs // n, pairs % n
    product = (keys[source] * keys[target]).sum(-1)
    order = product.argsort(descending=True, stable=True)
    order = order[source[order].argsort(stable=True)]
    source, target = source[order], target[order]
    starts = torch.searchsorted(source, torch.arange(n, device=keys.device))
    place = torch.arange(len(source), device=keys.device) - starts[source]
    width = min(longest, int(place.max()) + 1) if len(place) else 0
    lists = torch.full((n, width), NONE, device=keys.device)
    few = place < width
    lists[source[few], place[few]] = target[few]
    return lists


def _both_ways(keys: Tensor, neighbours: Tensor, degree: int) -> Tensor:
    """The same with every edge in both directions, pruned again."""
    import torch

    source, at = (neighbours != NONE).nonzero().T
    target = neighbours[source, at]
    both = torch.cat([source, target]), torch.cat([target, source])
    return _pruned(keys, *both, degree)


def _distinct(neighbours: Tensor) -> Tensor:
    """Every neighbour once a row."""
    ordered = neighbours.sort(-1, descending=True).values
    again = ordered[:, 1:] == ordered[:, :-1]
    ordered[:, 1:] = ordered[:, 1:].masked_fill(again, NONE)
    return ordered
