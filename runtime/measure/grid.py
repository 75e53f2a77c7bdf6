"""What is measured: the points of each kind of op, the most useful ones first."""

from __future__ import annotations

from dataclasses import dataclass

Heads = tuple[int, int, int]  # query heads, KV heads, head width
Matrix = tuple[int, int]  # columns out, columns in


@dataclass(frozen=True)
class Grid:
    """The points to measure. What stands first in a tuple is measured first.

    Args:
        heads: head geometries; the first is measured in full, the others in part.
        matrices: linear layers of the first shape, which whole steps are made of.
        more_matrices: linear layers of other sizes, to interpolate between.
        rows: rows of the first matrices and of element-wise ops.
        more_rows: further rows, for prefills and other batches.
        batches: sequences of a decode attention.
        more_batches: further ones.
        lengths: cached tokens a sequence.
        cache_bytes_most: largest cache of one layer.
        prompts: tokens of a prompt.
        depths: different layers that are run one after another.
        cache_tokens: of all sequences together, in whole steps with much cache.
        hidden: width of the residual stream.
        intermediate: width of the feed-forward block.
        vocabulary: rows of the output matrix.
        transfers: bytes of a copy between host and device.
        rotation_bytes: data that cold calls go through before a byte is met again.
    """

    heads: tuple[Heads, ...]
    matrices: tuple[Matrix, ...]
    more_matrices: tuple[Matrix, ...]
    rows: tuple[int, ...]
    more_rows: tuple[int, ...]
    batches: tuple[int, ...]
    more_batches: tuple[int, ...]
    lengths: tuple[int, ...]
    cache_bytes_most: int
    prompts: tuple[int, ...]
    depths: tuple[int, ...]
    cache_tokens: int
    hidden: int
    intermediate: int
    vocabulary: int
    transfers: tuple[int, ...]
    rotation_bytes: int

    def cache_fits(self, batch: int, length: int, heads: Heads) -> bool:
        """Whether one layer's cache of so many tokens is within the largest."""
        return 4 * batch * length * heads[1] * heads[2] <= self.cache_bytes_most


FULL = Grid(
    heads=((32, 8, 128), (32, 32, 128), (32, 8, 64), (64, 8, 128)),
    matrices=((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336), (128256, 4096)),
    more_matrices=(
        (2048, 2048), (8192, 2048), (10240, 8192), (57344, 8192), (8192, 28672), (1024, 1024),
        (16384, 2048), (5120, 5120),
    ),
    rows=(1, 2, 4, 8, 16, 32),
    more_rows=(6, 12, 24, 48, 64, 96, 128, 192, 256, 384, 768, 1024, 1536, 4096, 512, 2048, 8192),
    batches=(1, 2, 4, 8, 16, 32),
    more_batches=(6, 12, 24, 48, 64),
    lengths=(1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072),
    cache_bytes_most=2_400_000_000,
    prompts=(1024, 2048, 4096, 8192, 16384, 32768),
    depths=(32, 8),
    cache_tokens=262_144,
    hidden=4096,
    intermediate=14336,
    vocabulary=128256,
    transfers=(2**12, 2**16, 2**20, 2**24, 2**28),
    rotation_bytes=256 * 2**20,
)  # fmt: skip

QUICK = Grid(
    heads=FULL.heads[:1],
    matrices=FULL.matrices,
    more_matrices=FULL.more_matrices[:3],
    rows=(1, 8, 32),
    more_rows=(512, 8192),
    batches=(1, 8, 32),
    more_batches=(),
    lengths=(1024, 8192, 32768),
    cache_bytes_most=1_200_000_000,
    prompts=(2048, 8192),
    depths=(32,),
    cache_tokens=262_144,
    hidden=4096,
    intermediate=14336,
    vocabulary=128256,
    transfers=(2**16, 2**24),
    rotation_bytes=256 * 2**20,
)
