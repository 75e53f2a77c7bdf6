"""FlashInfer's paged decode attention on as many bytes, where it can be imported.

Ye et al., "FlashInfer", MLSys 2025, arXiv 2501.01005. Its three kernels for Hopper, each with and
without early launch (programmatic dependent launch), which lets calls that follow one another in a
graph overlap.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from paged import copies, time_s
from torch import Tensor

PAGE = 64
WORKSPACE_BYTES = 128 << 20
Attend = Callable[[Tensor, Tensor, Tensor, bool], object]  # q, kv, out, early


@dataclass(frozen=True)
class Decode:
    """Equally long sequences, one query token each."""

    batch: int
    kv_heads: int
    group: int
    head_dim: int
    tokens: int

    @property
    def pages(self) -> int:
        """Of one sequence."""
        return -(-self.tokens // PAGE)

    def buffers(self) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, output: ``[B, Hq, D]``, ``[pages, 2, 64, H, D]``."""
        pages, heads = self.batch * self.pages, self.kv_heads * self.group
        q = torch.randn(self.batch, heads, self.head_dim, device="cuda").bfloat16()
        size = (pages, 2, PAGE, self.kv_heads, self.head_dim)
        kv = torch.empty(size, device="cuda", dtype=torch.bfloat16).normal_()
        return q, kv, torch.empty_like(q)

    def right(self, q: Tensor, kv: Tensor) -> Tensor:
        """What float64 says, ``[B, Hq, D]``."""
        by_sequence = kv.double().unflatten(0, (self.batch, self.pages)).transpose(1, 2)
        keys, values = by_sequence.flatten(2, 3)[:, :, : self.tokens].unbind(1)  # [B, N, H, D]
        queries = q.double().unflatten(1, (self.kv_heads, self.group))
        logits = torch.einsum("bhgd,bnhd->bhgn", queries, keys) / self.head_dim**0.5
        return torch.einsum("bhgn,bnhd->bhgd", logits.softmax(-1), values).flatten(1, 2)


def peers(asked: Decode) -> dict[str, Callable[[], float]]:
    """Functions that give seconds a call, cold, by name; none without FlashInfer."""
    return {
        f"{name}{', early launch' if early else ''}": partial(_seconds, prepare, asked, early)
        for name, prepare in _kernels().items()
        for early in (False, True)
    }


def errors(asked: Decode) -> dict[str, float]:
    """Frobenius error over the norm, against float64: that the peers are asked rightly."""
    found = {}
    for name, prepare in _kernels().items():
        q, kv, out = asked.buffers()
        prepare(asked)(q, kv, out, False)
        right = asked.right(q, kv)
        found[name] = float((out - right).norm() / right.norm())
    return found


def _kernels() -> dict[str, Callable[[Decode], Attend]]:
    if not importlib.util.find_spec("flashinfer"):
        return {}
    return {
        "flashinfer": partial(_planned, tensor_cores=False),
        "flashinfer, tensor cores": partial(_planned, tensor_cores=True),
        "flashinfer xqa": _xqa,
    }


def _seconds(prepare: Callable[[Decode], Attend], asked: Decode, early: bool) -> float:
    attend, first = prepare(asked), asked.buffers()
    ready = [first, *(asked.buffers() for _ in range(copies(first[1].nbytes) - 1))]
    return time_s([partial(attend, *each, early) for each in ready])


def _planned(asked: Decode, tensor_cores: bool) -> Attend:
    """The wrapper that plans its parts ahead."""
    import flashinfer

    starts, places, last = (
        torch.arange(asked.batch + 1, dtype=torch.int32, device="cuda") * asked.pages,
        torch.arange(asked.batch * asked.pages, dtype=torch.int32, device="cuda"),
        torch.full((asked.batch,), (asked.tokens - 1) % PAGE + 1, device="cuda").int(),
    )
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
        _workspace(), "NHD", use_cuda_graph=True, use_tensor_cores=tensor_cores,
        backend="fa2" if tensor_cores else "auto", paged_kv_indptr_buffer=starts.clone(),
        paged_kv_indices_buffer=places.clone(), paged_kv_last_page_len_buffer=last.clone(),
    )  # fmt: skip
    wrapper.plan(
        starts, places, last, asked.kv_heads * asked.group, asked.kv_heads, asked.head_dim, PAGE,
        pos_encoding_mode="NONE", q_data_type=torch.bfloat16, kv_data_type=torch.bfloat16,
        o_data_type=torch.bfloat16,
    )  # fmt: skip
    return lambda q, kv, out, early: wrapper.run(q, kv, out=out, enable_pdl=early)


def _xqa(asked: Decode) -> Attend:
    """What its ``trtllm_batch_decode_with_kv_cache`` chooses on Hopper."""
    from flashinfer.decode import trtllm_batch_decode_with_kv_cache

    places = torch.arange(asked.batch * asked.pages, dtype=torch.int32, device="cuda")
    tables = places.view(asked.batch, asked.pages)
    lengths, room = torch.full_like(tables[:, 0], asked.tokens), _workspace()
    return lambda q, kv, out, early: trtllm_batch_decode_with_kv_cache(
        q, kv, room, tables, lengths, asked.tokens, bmm1_scale=asked.head_dim**-0.5,
        bmm2_scale=1.0, out=out, kv_layout="NHD", enable_pdl=early, backend="xqa",
    )  # fmt: skip


def _workspace() -> Tensor:
    return torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device="cuda")
