"""Rotation that waits for whoever needs it: never unread, and in the launch that appends."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed; the kernels have no interpreter")
if os.environ["TRITON_INTERPRET"] != "1":
    pytest.skip("Triton's interpreter is switched off", allow_module_level=True)

from kvtune.policies.option import Option
from kvtune.policies.page_formats import BF16_PAGE
from kvtune.policies.policy import Policy
from kvtune.runtime import load_cache
from kvtune.runtime.cache.backend import Backend
from kvtune.runtime.cache.paged_layer import PagedLayer
from kvtune.runtime.cache.plain_backend import PlainBackend
from kvtune.runtime.cache.pool import Pool
from kvtune.runtime.cache.reserving import reserve
from kvtune.runtime.cache.segments import GROWN
from kvtune.runtime.cache.sliding import Ring
from kvtune.runtime.cache.triton_backend import TritonBackend
from kvtune.runtime.fuse import fused
from kvtune.runtime.kernels import elementwise
from kvtune.runtime.kernels.elementwise import rotate
from kvtune.runtime.rotation import Rotation, owed, rotate_later
from kvtune.tests.tiers import first

pytestmark = pytest.mark.usefixtures("one_thread", "quick_interpreter")
TOKENS = 3
Append = Callable[[PagedLayer, Rotation, Tensor], Tensor]


def token(
    head_dim: int, heads: int, group: int, batch: int, angles: int
) -> tuple[Rotation, Tensor]:
    """What one joined projection says of a token a sequence, and where it is."""
    sizes = [heads * group, heads, heads]
    joined = torch.randn(batch, 1, sum(sizes) * head_dim).bfloat16()
    parts = joined.split([size * head_dim for size in sizes], -1)
    q, k, v = (part.view(batch, 1, -1, head_dim).transpose(1, 2) for part in parts)
    cos, sin = torch.randn(2, angles, 1, head_dim).bfloat16()
    return Rotation(q, k, cos, sin), v[:, :, 0]


def growing(head_dim: int, heads: int, batch: int, slides: bool, backend: Backend) -> PagedLayer:
    """Room for a few tokens, in which other formats have left something behind."""
    pages = 2 * batch * heads
    pool = Pool(pages * BF16_PAGE, 4 * head_dim, "cpu")
    pool.memory.fill_(0x7F)
    layer = PagedLayer(0, [Option()] * heads, head_dim, batch, pool, backend)
    if slides:
        layer.ring = Ring(np.array([[0, 1]] * layer.rows))
        layer.most[:] = 2
    layer.seal(TOKENS)
    reserve(layer, TOKENS)
    return layer


def held(layer: PagedLayer, tokens: int) -> tuple[Tensor, Tensor]:
    """Keys of each row's tokens, and a page of its values, cleared behind them."""
    cells = [int(cells[0]) for cells in layer.pages[GROWN]]
    pages = [layer.pool.memory.view(torch.bfloat16)[2 * layer.head_dim * at :] for at in cells]
    keys, values = torch.stack(
        [page[: 2 * BF16_PAGE * layer.head_dim].view(2, BF16_PAGE, -1).float() for page in pages], 1
    )
    return keys[:, :tokens], values


def at_once(layer: PagedLayer, rotation: Rotation, values: Tensor) -> Tensor:
    return layer.append_rotated(rotation, values)


def one_after_the_other(layer: PagedLayer, rotation: Rotation, values: Tensor) -> Tensor:
    q, k = rotate(rotation.q, rotation.k, rotation.cos, rotation.sin)
    layer.append(k[:, :, 0], values)
    return q


SHAPES = [
    (64, 1, 7, 2, 2), (64, 2, 1, 1, 1), (128, 2, 4, 3, 1), (128, 2, 3, 2, 2), (256, 1, 8, 2, 2),
]  # fmt: skip


@pytest.mark.parametrize("slides", [False, True])
@pytest.mark.parametrize("shape", first(SHAPES))
def test_one_launch_rotates_and_appends_as_two_do(
    shape: tuple[int, int, int, int, int], slides: bool
) -> None:
    head_dim, heads, _, batch, _ = shape
    tokens = [token(*shape) for _ in range(TOKENS)]
    found = []
    ways: list[tuple[Backend, Append]] = [
        (PlainBackend(), at_once), (TritonBackend(), at_once),
        (TritonBackend(), one_after_the_other),
    ]  # fmt: skip
    for backend, append in ways:
        layer = growing(head_dim, heads, batch, slides, backend)
        queries = torch.stack([append(layer, *each) for each in tokens])
        assert queries.is_contiguous()
        found.append((queries.float(), *held(layer, 2 if slides else TOKENS), layer.paged.lengths))
    plain, ours, before = found
    assert ours[-1].unique().tolist() == [0, 2 if slides else TOKENS]
    for mine, exact, present in zip(ours, plain, before, strict=True):
        assert torch.equal(mine, present)
        torch.testing.assert_close(mine, exact, atol=1e-6, rtol=2**-7)  # it cuts bf16 off


def test_whoever_looks_at_what_is_owed_sees_it_rotated() -> None:
    tensors = vars(token(64, 2, 2, 3, 3)[0]).values()
    expected = rotate(*tensors)
    looks: list[Callable[[Tensor], Any]] = [
        lambda x: x + 0, lambda x: x[:, :, 0], lambda x: torch.cat([x, x], 2), Tensor.tolist,
        lambda x: x.transpose(1, 2).contiguous(), lambda x: x.clone().mul_(2), Tensor.stride,
        lambda x: x.dtype, lambda x: x.device, lambda x: torch.softmax(input=x, dim=-1),
    ]  # fmt: skip
    for look in looks:
        for owing, exact in zip(rotate_later(*tensors), expected, strict=True):
            assert owing.shape == exact.shape
            mine, theirs = look(owing), look(exact)
            assert torch.equal(mine, theirs) if isinstance(mine, Tensor) else mine == theirs
            assert type(mine) is type(theirs)


def test_what_is_owed_is_owed_to_both_and_only_until_it_is_done() -> None:
    tensors = vars(token(64, 1, 2, 1, 1)[0]).values()
    (q, k), (other, _) = rotate_later(*tensors), rotate_later(*tensors)
    rotation = owed(q, k)
    assert rotation is not None
    assert rotation.q.shape == q.shape
    assert owed(other, k) is owed(q.clone(), k) is owed(q, torch.zeros(k.shape)) is None
    assert owed(q, k) is None  # q was looked at


@pytest.mark.parametrize("family", first(["Cohere", "Llama"]))
def test_only_halves_that_turn_together_are_left_to_the_kernel(
    family: str, make_network: Callable[..., Any], tiny_fields: dict[str, Any]
) -> None:
    """Cohere's channels turn with their neighbours."""
    import transformers

    network = make_network(getattr(transformers, f"{family}Config")(**tiny_fields)).eval()
    modeling = sys.modules[type(network).__module__]
    ids = torch.randint(2, 250, (2, 6), generator=torch.Generator().manual_seed(0))
    original = modeling.apply_rotary_pos_emb
    expected = told(network, ids, transformers.DynamicCache(config=network.config))
    with fused(network):
        assert (modeling.apply_rotary_pos_emb is original) == (family == "Cohere")
        own = told(network, ids, transformers.DynamicCache(config=network.config))
    torch.testing.assert_close(own, expected, atol=2e-5, rtol=2e-4)


def told(network: Any, ids: Tensor, cache: Any) -> Tensor:
    """Logits of two tokens after a prompt."""
    network(ids[:, :-2], past_key_values=cache)
    steps = [network(ids[:, n, None], past_key_values=cache) for n in (-2, -1)]
    return torch.cat([step.logits for step in steps], 1)


@pytest.mark.parametrize("family", first(["Llama", "Gemma3Text"]))
@torch.no_grad()
def test_a_model_decodes_as_ever_with_a_launch_less(
    family: str,
    make_network: Callable[..., Any],
    tiny_fields: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import transformers

    fields = {**tiny_fields, "head_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    fields["num_key_value_heads"] = 1
    slides = {"sliding_window": 5} if "Gemma" in family else {}
    network = make_network(getattr(transformers, f"{family}Config")(**fields, **slides)).eval()
    ids = torch.randint(2, 250, (1, 7), generator=torch.Generator().manual_seed(0))

    def through_pages(backend: Backend) -> Tensor:
        monkeypatch.setattr("kvtune.runtime.cache.policy_cache.backend_for", lambda _: backend)
        with fused(network):
            return told(network, ids, load_cache(Policy.uniform(Option(), 2, 1), network))

    expected = told(network, ids, transformers.DynamicCache(config=network.config))
    with fused(network):
        own = told(network, ids, transformers.DynamicCache(config=network.config))
    torch.testing.assert_close(own, expected, atol=2e-5, rtol=2e-4)
    with monkeypatch.context() as present:
        present.setattr("kvtune.runtime.cache.layer.owed", lambda q, k: None)
        plain, before = through_pages(PlainBackend()), through_pages(TritonBackend())
    monkeypatch.setattr(elementwise, "rotate", None)  # whoever needs it fails
    assert torch.equal(through_pages(TritonBackend()), before)
    torch.testing.assert_close(through_pages(PlainBackend()), plain, atol=5e-3, rtol=5e-3)
