"""Policies of very different kinds and sizes, for asking how well a prediction ranks them."""

from __future__ import annotations

import numpy as np

from kvtune.policies.allocators.pyramid import Pyramid
from kvtune.policies.format import Format
from kvtune.policies.formats.bf16 import Bf16
from kvtune.policies.formats.fp8 import Fp8
from kvtune.policies.formats.grouped import Int2, Int3, Int4, Int8
from kvtune.policies.method import Method
from kvtune.policies.methods.full import Full
from kvtune.policies.methods.h2o import H2O
from kvtune.policies.methods.snapkv import SnapKV
from kvtune.policies.methods.streaming_llm import StreamingLLM
from kvtune.policies.option import Budget, Option
from kvtune.policies.policy import Policy

METHODS: tuple[Method, ...] = (
    SnapKV(),
    SnapKV(window=16, recent=8),
    SnapKV(kernel=1),
    H2O(),
    H2O(recent_share=0.1),
    StreamingLLM(),
    Full(),
)
SHARES = (0.03, 0.07, 0.15, 0.4)


def mixed_policies(layers: int, kv_heads: int, seed: int = 0) -> list[tuple[str, Policy]]:
    """(kind, policy) pairs: 28 uniform, 14 pyramid, 32 random per head, 24 quantised."""
    rng = np.random.default_rng(seed)
    found: list[tuple[str, Policy]] = []
    for method in METHODS:
        for share in SHARES:
            option = Option(method, Budget(share=share))
            found.append(("uniform", Policy.uniform(option, layers, kv_heads)))
    for method in METHODS:
        for share in (0.07, 0.2):
            option = Option(method, Budget(share=share))
            pyramid = Policy.uniform(option, layers, kv_heads, allocator=_pyramid(method))
            found.append(("pyramid", pyramid))
    found += [("random", _random(layers, kv_heads, rng, None)) for _ in range(20)]
    forms = (Bf16(), Int8(), Int4(), Int3(), Int2())
    found += [("random", _random(layers, kv_heads, rng, forms)) for _ in range(12)]
    for keys in (Fp8(), Int8(), Int4(), Int3(), Int2()):
        for values in (Int4(), Int2()):
            found.append(("quantised", _whole(layers, kv_heads, keys, values)))
    for keys, values in ((Int8(), Int8()), (Fp8(), Fp8()), (Int3(), Int3()), (Int2(), Bf16())):
        found.append(("quantised", _whole(layers, kv_heads, keys, values)))
    for _ in range(10):
        found.append(("quantised", _random_bits(layers, kv_heads, rng)))
    return found


def _pyramid(method: Method) -> Pyramid:
    """Its authors' has an observation window, which every layer has."""
    return Pyramid(window=method.needs.window)


def _whole(layers: int, kv_heads: int, keys: Format, values: Format) -> Policy:
    return Policy.uniform(Option(keys=keys, values=values), layers, kv_heads)


def _random(
    layers: int, kv_heads: int, rng: np.random.Generator, forms: tuple[Format, ...] | None
) -> Policy:
    """Every head its own method and a budget log-uniform around the policy's own mean."""
    centre = rng.uniform(np.log(0.03), np.log(0.5))
    spread = rng.uniform(0.2, 1.2)

    def option() -> Option:
        share = float(np.clip(np.exp(rng.normal(centre, spread)), 0.005, 1.0))
        method = METHODS[rng.integers(len(METHODS))]
        keys, values = (forms[i] for i in rng.integers(len(forms), size=2)) if forms else _BF16
        return Option(method, Budget(share=share), keys, values)

    heads = tuple(tuple(option() for _ in range(kv_heads)) for _ in range(layers))
    return Policy("random", heads)


def _random_bits(layers: int, kv_heads: int, rng: np.random.Generator) -> Policy:
    forms = (Bf16(), Int8(), Int4(), Int3(), Int2())
    weights = rng.dirichlet(np.ones(len(forms)))

    def option() -> Option:
        keys, values = (forms[i] for i in rng.choice(len(forms), 2, p=weights))
        return Option(keys=keys, values=values)

    heads = tuple(tuple(option() for _ in range(kv_heads)) for _ in range(layers))
    return Policy("random bits", heads)


_BF16 = (Bf16(), Bf16())
