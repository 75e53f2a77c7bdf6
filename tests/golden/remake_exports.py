"""Writes the golden exports: python tests/golden/remake_exports.py."""

from __future__ import annotations

import re
from pathlib import Path

from kvtune.policies.export.contract import Export, exporters
from kvtune.policies.policy_file.document import read_policy

FOLDER = Path(__file__).parent / "exports"
POLICY = """\
kvtune_policy: 1
name: golden
model: {name: tiny, layers: 4, kv_heads: 2, head_dim: 64}
serving: {context_tokens: 1024, batch: 2}
provenance:
  quality: {source: stand-in, stand_in: smollm2-135m, kl_nats_per_token: 0.029,
            interval: [0.021, 0.037], tier: table}
options:
  a: {method: snapkv, budget: 12.5%, keys: int4, values: int2}
  b: {method: {name: streaming_llm, sinks: 4}, budget: 256, keys: int4, values: int4}
  c: {method: full, budget: 512, keys: {name: int8, exact_first: 4}, values: int8}
  d: {}
heads:
  - [a, b]
  - [c, c]
  - [d, d]
  - [b, b]
"""


def exports() -> dict[str, Export]:
    """The policy above for every stack."""
    document = read_policy(POLICY)
    return {
        name: kind().export(document, model="models/tiny", allow_stand_in=True)
        for name, kind in exporters().items()
    }


def golden_files(export: Export) -> dict[str, str]:
    """What is compared: not the module, which is the same for every policy, nor the version."""
    return {
        name: re.sub(r"kvtune \S+ for", "kvtune VERSION for", text)
        for name, text in export.files.items()
        if not name.endswith(".py")
    }


if __name__ == "__main__":
    for stack, made in exports().items():
        for file, content in golden_files(made).items():
            (FOLDER / stack).mkdir(parents=True, exist_ok=True)
            (FOLDER / stack / file).write_text(content)
