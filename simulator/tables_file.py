"""Tables on disk: one safetensors file, compact enough to ship, its contents described inside.

Own terms are stored as float16 roots; factors as int8 codes with a float16 scale a (head, option).
Both cost less than the samples' own noise: a factor's rounding is a 250th of its largest entry.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from kvtune.common.errors import KvtuneError
from kvtune.common.files import atomic
from kvtune.policies.document import PolicyDocument, read_policy, write_policy
from kvtune.policies.policy import Policy
from kvtune.simulator.tables import SampleFacts, Tables

FORMAT = 1


def save_tables(tables: Tables, path: Path, provenance: dict[str, Any]) -> None:
    """Write tables atomically.

    Args:
        tables: what to write.
        path: ``*.safetensors``.
        provenance: plain data on how they came about, kept beside them.
    """
    scale = np.abs(tables.factor).max(-1, keepdims=True) / 127
    codes = np.round(tables.factor / np.maximum(scale, 1e-20)).astype(np.int8)
    arrays = {
        "loss_root": np.sqrt(np.maximum(tables.loss, 0)).astype(np.float16),
        "factor_codes": codes,
        "factor_scale": (scale[..., 0] * _SCALE_UNIT).astype(np.float16),
        "group": tables.group.astype(np.int64),
    }
    menu = PolicyDocument(policy=Policy("options", (tables.options,)))
    about = {
        "format": FORMAT,
        "model": tables.model,
        "layers": tables.layers,
        "kv_heads": tables.kv_heads,
        "head_dim": tables.head_dim,
        "prompt_tokens": tables.prompt_tokens,
        "samples": [asdict(sample) for sample in tables.samples],
        "options": write_policy(menu),
        "provenance": provenance,
    }
    with atomic(path) as temporary:
        save_file(arrays, temporary, metadata={"kvtune_tables": json.dumps(about)})


_SCALE_UNIT = 1024.0  # lifts small scales out of float16's subnormal range


def load_tables(path: Path) -> tuple[Tables, dict[str, Any]]:
    """Tables and their provenance.

    Raises:
        KvtuneError: missing, damaged, or written by a newer kvtune.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            about = json.loads((file.metadata() or {}).get("kvtune_tables", "{}"))
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return _assemble(about, arrays, str(path)), about["provenance"]
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise KvtuneError(
            "these tables cannot be read", where=str(path), hint="remove the file to make it again."
        ) from error


def _assemble(about: dict[str, Any], arrays: dict[str, Any], where: str) -> Tables:
    if about.get("format") != FORMAT:
        raise KvtuneError(f"tables of format {about.get('format')}, not {FORMAT}", where=where)
    menu = read_policy(about["options"]).policy
    assert isinstance(menu, Policy)  # noqa: S101 - written above, as an explicit policy
    scale = arrays["factor_scale"].astype(np.float32)[..., None] / _SCALE_UNIT
    return Tables(
        model=about["model"],
        layers=about["layers"],
        kv_heads=about["kv_heads"],
        head_dim=about["head_dim"],
        prompt_tokens=about["prompt_tokens"],
        options=menu.heads[0],
        samples=tuple(SampleFacts(**sample) for sample in about["samples"]),
        loss=arrays["loss_root"].astype(np.float32) ** 2,
        factor=arrays["factor_codes"].astype(np.float32) * scale,
        group=arrays["group"],
    )
