"""What papers claim of their methods and formats, and how each claim is measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from measures import (
    Measure,
    NamedPolicy,
    asked_before,
    asked_later,
    compressed,
    cosine,
    generated,
)

from kvtune.policies.allocators.adakv import AdaKV
from kvtune.policies.allocators.cake_layers import CakeLayers
from kvtune.policies.allocators.pyramid import Pyramid
from kvtune.policies.format import Format
from kvtune.policies.formats.gear import Gear
from kvtune.policies.formats.grouped import Int2, Int3, Int4
from kvtune.policies.formats.kivi import Kivi
from kvtune.policies.formats.kvquant import KvQuant
from kvtune.policies.formats.rotated import RotatedInt2


@dataclass(frozen=True)
class Claim:
    """That ``better`` does better than ``worse``."""

    text: str
    measure: Measure
    better: NamedPolicy
    worse: NamedPolicy


def _against(method: str, share: float, **parameters: Any) -> NamedPolicy:
    return NamedPolicy(method, share, parameters=tuple(parameters.items()))


def _stored(form: Format) -> NamedPolicy:
    """All tokens in one format."""
    return NamedPolicy("full", 1.0, stored=(form, form))


BY_TOKEN = Int2(keys_by="token")
RETAINED = (BY_TOKEN, Int2())  # what MiKV stores its less important tokens in
WINDOW = {"sinks": 0}
PYRAMID = Pyramid(window=32)  # SnapKV's: without it the last layers would starve
CLAIMS = (
    Claim(
        "H2O beats a window at 20 %",
        generated, _against("h2o", 0.2), _against("streaming_llm", 0.2, **WINDOW),
    ),
    Claim(
        "sinks beat a plain window at 20 %",
        generated, _against("streaming_llm", 0.2), _against("streaming_llm", 0.2, **WINDOW),
    ),
    Claim("A2SF's attention is nearer than H2O's at 20 %",
          cosine, _against("a2sf", 0.2), _against("h2o", 0.2)),
    Claim("Ada-KV beats even budgets at 10 %",
          compressed, NamedPolicy("snapkv", 0.1, allocator=AdaKV()), _against("snapkv", 0.1)),
    Claim("SnapKV beats H2O at 10 % where it has seen the question",
          asked_before, _against("snapkv", 0.1), _against("h2o", 0.1)),
    Claim("KVzip beats SnapKV at 10 % where the question comes later",
          asked_later, _against("kvzip", 0.1), _against("snapkv", 0.1)),
    Claim("a pyramid beats even budgets at 64 tokens",
          compressed, NamedPolicy("snapkv", tokens=64, allocator=PYRAMID),
          NamedPolicy("snapkv", tokens=64)),
    Claim("even budgets are no worse than a pyramid at 256 tokens",
          compressed, NamedPolicy("snapkv", tokens=256),
          NamedPolicy("snapkv", tokens=256, allocator=PYRAMID)),
    Claim("TOVA beats H2O at 12.5 %",
          generated, _against("tova", 0.125), _against("h2o", 0.125)),
    Claim("LazyEviction beats H2O at 50 % (plain text, not chains of thought)",
          generated, _against("lazy_eviction", 0.5, window=25), _against("h2o", 0.5)),
    Claim("LazyEviction beats TOVA at 50 % (plain text, not chains of thought)",
          generated, _against("lazy_eviction", 0.5, window=25), _against("tova", 0.5)),
    Claim("retrieval heads choose better than all heads at 10 % (CompressKV)",
          compressed, _against("compresskv", 0.1), _against("compresskv", 0.1, voters=10_000)),
    Claim("CAKE beats a SnapKV pyramid at 10 %",
          compressed, NamedPolicy("cake", 0.1, allocator=CakeLayers()),
          NamedPolicy("snapkv", 0.1, allocator=PYRAMID)),
    Claim("SnapKV beats KeyDiff at 10 % where the prompt is scored whole",
          compressed, _against("snapkv", 0.1), _against("keydiff", 0.1)),
    Claim("KeyDiff beats a window at 10 % where the prompt comes in blocks",
          compressed, _against("keydiff_blockwise", 0.1), _against("streaming_llm", 0.1, **WINDOW)),
    *(
        Claim(f"Keyformer beats H2O at 20 %, seed {seed}",
              generated, _against("keyformer", 0.2, seed=seed), _against("h2o", 0.2))
        for seed in range(3)
    ),
    Claim("Keyformer with noise beats none at 20 %",
          generated, _against("keyformer", 0.2), _against("keyformer", 0.2, noise=0.0)),
    Claim("merging beats evicting at 5 % (EMS reconstructed: ours, not the paper's)",
          compressed, _against("ems_reconstruction", 0.05),
          _against("ems_reconstruction", 0.05, threshold=2.0)),
    Claim("keys by channel beat keys by token at two bits (KIVI)",
          compressed, _stored(Int2()), _stored(BY_TOKEN)),
    Claim("a window of 128 in 16 bits beats none at two bits (KIVI)",
          compressed, _stored(Kivi()), _stored(Kivi(residual=0))),
    Claim("low rank and outliers beat their two-bit backbone (GEAR)",
          compressed, _stored(Gear()), _stored(Int2())),
    Claim("low rank and outliers beat low rank alone (GEAR)",
          compressed, _stored(Gear()), _stored(Gear(outliers=0.0))),
    Claim("at its own bytes GEAR beats plain four bits (ours, not the paper's)",
          compressed, _stored(Gear()), _stored(Int4())),
    Claim("two bits for the rest beat evicting it at 20 % in 16 bits (MiKV)",
          compressed, NamedPolicy("mikv", 0.2, stored=RETAINED), _against("h2o", 0.2)),
    Claim("two bits for the rest find more needles than evicting it at 20 % (MiKV)",
          asked_later, NamedPolicy("mikv", 0.2, stored=RETAINED), _against("h2o", 0.2)),
    Claim("balanced keys beat plain ones at two bits (MiKV)",
          compressed, NamedPolicy("mikv", 0.2, stored=RETAINED),
          NamedPolicy("mikv", 0.2, parameters=(("balanced", False),), stored=RETAINED)),
    Claim("fitted levels beat even ones at three bits (KVQuant)",
          compressed, _stored(KvQuant(outliers=0.0)), _stored(Int3(exact_first=1))),
    Claim("1 % of outliers exact beats none at three bits (KVQuant)",
          compressed, _stored(KvQuant()), _stored(KvQuant(outliers=0.0))),
    Claim("a rotation beats none at two bits (QuaRot, RotateKV)",
          compressed, _stored(RotatedInt2()), _stored(Int2())),
)  # fmt: skip
