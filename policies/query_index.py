"""An index of keys made from the queries that will ask for them: lists by query, then neighbours.

Later queries are alike in content to the prompt's and stand behind it, so that the prompt's queries
are turned there by their rotary positions before they say which keys a query looks at: where they
were asked, the same content looks at other distances. Such queries are divided into clusters, each
with a list of the keys that its queries look at most, and clusters into groups. A search compares
the groups' centres, those of clusters in the nearest groups, keys of the lists of the nearest
clusters, then neighbours of the best keys met, up to a number of keys.
Two keys are neighbours if queries give them nearly the same products.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvtune.policies.key_graph import NONE

if TYPE_CHECKING:
    from torch import Tensor

_ROUNDS = 8  # of k-means
_GROUPS_LOOKED_INTO = 2
_SPREAD = 1.5  # clusters of a group, over the mean: the nearest, which may be others' too
_NEAREST = 4  # clusters whose lists are merged
_SHARPNESS = 20.0  # of their weights, exp(sharpness x cosine)
_EXPANDED = 8  # keys whose neighbours are met at once
_AT_ONCE = 1024  # rows of a product of all by all


@dataclass(frozen=True, eq=False)
class QueryIndex:
    """Keys, clusters of queries with their lists, and neighbours.

    Args:
        keys: ``[n, D]`` float32.
        metric: queries are compared as ``q @ metric``: by what they do to keys, ``[D, D]``.
        groups: centres of groups of clusters, of length 1, in that metric, ``[S, D]``.
        members: clusters of each group, ``[S, m]`` int64.
        centres: of the clusters, of length 1, in that metric, ``[C, D]``.
        lists: keys of each cluster, ``[C, w]`` int64.
        shares: of its queries that look at them, falling, ``[C, w]``; 0 behind the last.
        neighbours: of each key, ``[n, m]`` int64.
    """

    keys: Tensor
    metric: Tensor
    groups: Tensor
    members: Tensor
    centres: Tensor
    lists: Tensor
    shares: Tensor
    neighbours: Tensor

    @staticmethod
    def build(
        keys: Tensor, queries: Tensor, clusters: int, near: int, longest: int, degree: int
    ) -> QueryIndex:
        """Cluster the queries, list what each cluster looks at, and join keys.

        Args:
            keys: ``[n, D]`` float32.
            queries: ``[m, D]`` float32, turned to where later ones will stand.
            clusters: C, at most.
            near: keys of largest product that a query looks at.
            longest: keys of a list.
            degree: neighbours of a key.
        """
        import torch
        import torch.nn.functional as F

        metric = _root(torch.cov(keys.T))
        alike = F.normalize(queries @ metric, dim=-1)
        centres, at = _clusters(alike, min(clusters, len(queries)))
        counts = torch.zeros(len(centres), len(keys), device=keys.device)
        for some, where in zip(queries.split(_AT_ONCE), at.split(_AT_ONCE), strict=True):
            best = (some @ keys.T).topk(min(near, len(keys)), -1).indices
            flat = where[:, None] * len(keys) + best
            counts.view(-1).index_add_(
                0, flat.flatten(), torch.ones_like(flat.flatten(), dtype=counts.dtype)
            )
        sizes = torch.bincount(at, minlength=len(centres)).clamp_min(1)
        everyone = counts.sum(0) / len(queries)  # breaks ties, and fills the lists of few queries
        shares, lists = (counts / sizes[:, None] + 0.05 * everyone).topk(
            min(longest, len(keys)), -1
        )
        seen_as = keys @ _root(queries.T @ queries / len(queries))
        several, each = sizes_of_groups(len(centres))
        groups, _ = _clusters(centres, several)
        members = (groups @ centres.T).topk(each, -1).indices
        near_by = _nearest(seen_as, degree)
        return QueryIndex(keys, metric, groups, members, centres, lists, shares, near_by)

    @property
    def centres_compared(self) -> int:
        """Centres of groups and clusters that a search compares with its query."""
        return centres_compared(len(self.centres))

    def search(
        self, queries: Tensor, wanted: int, compared: int, listed: float = 0.5
    ) -> tuple[Tensor, Tensor]:
        """Keys of largest product with each query, among those that are compared.

        Args:
            queries: ``[q, D]``.
            wanted: keys to name.
            compared: the most that are compared of keys; all centres come on top.
            listed: share of the keys compared that come from lists; the others are neighbours.

        Returns:
            the best keys, best first, ``[q, wanted]`` (``NONE`` where fewer were met), and which
            keys were compared, ``[q, n]`` bool.
        """
        import torch

        room = max(compared, wanted)
        met = self._listed(queries)[:, : max(int(listed * room), 1)]
        visited = torch.zeros(len(queries), len(self.keys), dtype=torch.bool, device=met.device)
        visited.scatter_(1, met, value=True)
        worth = torch.full(visited.shape, -torch.inf, device=met.device)
        worth.scatter_(1, met, _products(queries, self.keys, met))
        opened = torch.zeros_like(visited)
        while True:
            best, at = worth.masked_fill(opened, -torch.inf).topk(
                min(_EXPANDED, len(self.keys)), -1
            )
            opened.scatter_(1, at, value=True)
            left = room - visited.sum(-1, keepdim=True)
            if not bool(((left > 0) & (best[:, :1] > -torch.inf)).any()):
                break
            fresh = self._fresh(at, best, visited)
            fresh &= fresh.cumsum(-1) <= left
            row, key = fresh.nonzero().T
            visited[row, key] = True
            worth[row, key] = (queries[row] * self.keys[key]).sum(-1)
        best, ids = worth.topk(wanted, -1)
        return ids.masked_fill(best == -torch.inf, NONE), visited

    def _listed(self, queries: Tensor) -> Tensor:
        """Keys of the nearest clusters' lists, merged, the likeliest first, ``[q, w]``."""
        import torch
        import torch.nn.functional as F

        asked = F.normalize(queries @ self.metric, dim=-1)
        group = (asked @ self.groups.T).topk(min(_GROUPS_LOOKED_INTO, len(self.groups)), -1).indices
        compared = torch.zeros(len(asked), len(self.centres), dtype=torch.bool, device=asked.device)
        compared.scatter_(1, self.members[group].flatten(1), value=True)
        cosine = (asked @ self.centres.T).masked_fill(~compared, -torch.inf)
        nearest, at = cosine.topk(min(_NEAREST, self.members.shape[1]), -1)
        weight = (_SHARPNESS * nearest).softmax(-1)
        likely = torch.zeros(len(queries), len(self.keys), device=queries.device)
        entries = self.lists[at].flatten(1)
        likely.scatter_add_(1, entries, (weight[..., None] * self.shares[at]).flatten(1))
        return likely.topk(self.lists.shape[1], -1).indices

    def _fresh(self, at: Tensor, best: Tensor, visited: Tensor) -> Tensor:
        """Neighbours of some keys that were not met yet, ``[q, n]`` bool."""
        import torch

        fresh = torch.zeros_like(visited)
        around = self.neighbours[at]
        there = (best > -torch.inf)[..., None].expand_as(around)
        row = torch.arange(len(at), device=at.device)[:, None, None].expand_as(around)
        fresh[row[there], around[there]] = True
        return fresh & ~visited


def sizes_of_groups(clusters: int) -> tuple[int, int]:
    """Groups of so many clusters, and the clusters of each."""
    groups = max(round(clusters**0.5), 1)
    return groups, min(math.ceil(_SPREAD * clusters / groups), clusters)


def centres_compared(clusters: int) -> int:
    """The most centres that a search compares with its query."""
    groups, each = sizes_of_groups(clusters)
    return groups + min(min(_GROUPS_LOOKED_INTO, groups) * each, clusters)


def _products(queries: Tensor, keys: Tensor, at: Tensor) -> Tensor:
    """Of each query with its own keys, ``[q, w]``."""
    import torch

    parts = [
        torch.einsum("qd,qwd->qw", some, keys[where])
        for some, where in zip(queries.split(64), at.split(64), strict=True)
    ]
    return torch.cat(parts)


def _root(symmetric: Tensor) -> Tensor:
    """A matrix R with ``R @ R.T`` as given, which has no negative directions."""
    import torch

    size, direction = torch.linalg.eigh(symmetric)
    root: Tensor = direction * size.clamp_min(0).sqrt()
    return root


def _clusters(points: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Centres of length 1, ``[count, D]``, and each point's, by k-means on the sphere."""
    import torch
    import torch.nn.functional as F

    centres = points[torch.linspace(0, len(points) - 1, count, device=points.device).long()]
    for _ in range(_ROUNDS):
        at = (points @ centres.T).argmax(-1)
        sums = torch.zeros_like(centres).index_add_(0, at, points)
        centres = F.normalize(sums + 1e-9 * centres, dim=-1)
    return centres, (points @ centres.T).argmax(-1)


def _nearest(points: Tensor, count: int) -> Tensor:
    """The nearest other points of each, ``[n, count]``."""
    import torch

    found, count = [], min(count, len(points) - 1)
    for first in range(0, len(points), _AT_ONCE):
        some = points[first : first + _AT_ONCE]
        away = torch.cdist(some, points)
        own = torch.arange(first, first + len(some), device=points.device)
        away[torch.arange(len(some), device=points.device), own] = torch.inf
        found.append(away.topk(count, -1, largest=False).indices)
    return torch.cat(found)
