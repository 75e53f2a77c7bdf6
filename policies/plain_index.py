"""A plain index of keys, as vector libraries build it: FAISS's HNSW graph, on the host.

It joins keys that are near to each other. RetrievalAttention was made because queries of attention
lie elsewhere, so that such an index compares far more keys; it stands here beside the others, and
as what most vector databases would give.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvtune.common.errors import KvtuneError

if TYPE_CHECKING:
    from torch import Tensor


def require_faiss() -> None:
    """Refuse to go on without FAISS.

    Raises:
        KvtuneError: it is not installed.
    """
    if importlib.util.find_spec("faiss") is None:
        raise KvtuneError(
            "joins: hnsw searches an index of FAISS, which is not installed",
            hint="pip install 'kvtune[index]', or take joins: queries, keys or lists.",
        )


@dataclass(frozen=True, eq=False)
class PlainIndex:
    """Keys, and FAISS's graph over them.

    Args:
        keys: ``[n, D]`` float32.
        graph: of FAISS, which holds a copy of the keys in the host's memory.
    """

    keys: Tensor
    graph: Any

    @staticmethod
    def build(keys: Tensor, degree: int, near: int) -> PlainIndex:
        """Insert the keys one after another, so that equal keys give equal graphs.

        Args:
            keys: ``[n, D]`` float32.
            degree: neighbours of a key, twice as many in the lowest layer.
            near: candidates while a key is inserted.
        """
        import faiss

        graph = faiss.IndexHNSWFlat(keys.shape[1], degree, faiss.METRIC_INNER_PRODUCT)
        graph.hnsw.efConstruction = near
        with _one_thread():
            graph.add(keys.cpu().numpy())
        return PlainIndex(keys, graph)

    def search(self, queries: Tensor, beam: int) -> Tensor:
        """The keys of largest product that a search of this width meets, ``[q, beam]``; -1 where
        it met fewer."""
        import torch

        self.graph.hnsw.efSearch = beam
        with _one_thread():
            _, ids = self.graph.search(queries.cpu().numpy(), min(beam, len(self.keys)))
        return torch.from_numpy(ids).to(queries.device)


@contextmanager
def _one_thread() -> Iterator[None]:
    """FAISS on one thread, as it was before at the end."""
    import faiss

    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)
