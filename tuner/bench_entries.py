"""The leaderboard's policies: every method as it is published, and with budgets split."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvtune.common.errors import KvtuneError, nearest
from kvtune.policies.allocator import Allocator
from kvtune.policies.allocators.actqkv_layers import ActQKVLayers
from kvtune.policies.allocators.adakv import AdaKV
from kvtune.policies.allocators.as_given import AsGiven
from kvtune.policies.allocators.cake_layers import CakeLayers
from kvtune.policies.allocators.compresskv_layers import CompressKVLayers
from kvtune.policies.allocators.model_wide import ModelWide
from kvtune.policies.allocators.pyramid import Pyramid
from kvtune.policies.method import Method, methods
from kvtune.policies.methods.actqkv import ActQKV
from kvtune.policies.methods.cake import Cake
from kvtune.policies.methods.compresskv import CompressKV
from kvtune.policies.methods.expected_attention import ExpectedAttention
from kvtune.policies.methods.kvzip import KVzip
from kvtune.policies.methods.retrieval_attention import RetrievalAttention
from kvtune.policies.methods.snapkv import SnapKV


@dataclass(frozen=True)
class Entry:
    """A line of the leaderboard: a method and how its budget is split.

    Args:
        method: with its parameters.
        allocator: as given unless said.
        variant: how it differs from the published method, in a word; empty where it does not.
    """

    method: Method
    allocator: Allocator = AsGiven()
    variant: str = ""

    @property
    def name(self) -> str:
        """The method's, the variant's, and the allocator's if budgets are moved."""
        moved = "" if isinstance(self.allocator, AsGiven) else f" + {self.allocator.name}"
        return self.method.name + (f" {self.variant}" if self.variant else "") + moved

    @property
    def reads_less(self) -> bool:
        """Whether it reads less than it holds, and is filled by what it reads."""
        return self.method.reader(1) is not None


SPLIT = (
    Entry(SnapKV(), Pyramid(window=SnapKV().window)),
    Entry(SnapKV(), AdaKV()),
    Entry(ExpectedAttention(), AdaKV()),
    Entry(KVzip(), AdaKV()),
    Entry(KVzip(), ModelWide()),
    Entry(Cake(), CakeLayers()),
    Entry(CompressKV(), CompressKVLayers()),
    Entry(ActQKV(), ActQKVLayers()),
)
"""Methods with budgets split as their authors, or the field, do."""


VARIANTS = (Entry(RetrievalAttention(joins="lists"), variant="(lists)"),)
"""kvtune's own index, whose building takes seconds where the published graph takes minutes."""


def entries(only: Sequence[str] = ()) -> tuple[Entry, ...]:
    """All registered methods as they are published, those with split budgets, and variants.

    Args:
        only: names of entries or methods; all of them unless given.

    Raises:
        KvtuneError: a name is not known.
    """
    everything = (*(Entry(kind()) for _, kind in sorted(methods().items())), *SPLIT, *VARIANTS)
    known = {name for entry in everything for name in (entry.name, entry.method.name)}
    for name in only:
        if name not in known:
            raise KvtuneError(f"{name!r} is no policy of the bench", hint=nearest(name, known))
    return tuple(e for e in everything if not only or {e.name, e.method.name} & {*only})
