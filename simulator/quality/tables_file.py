"""Tables on disk: one safetensors file, compact enough to ship, its contents described inside.

Own terms are stored as float16 roots; factors as int8 codes with a float16 scale a (head, option).
Both cost less than the samples' own noise: a factor's rounding is a 250th of its largest entry.
"""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from kvtune.common.bounds import Count, Name
from kvtune.common.errors import KvtuneError
from kvtune.common.files import atomic
from kvtune.common.stored import checked, parse_json
from kvtune.policies.option import Option
from kvtune.policies.policy import Policy
from kvtune.policies.policy_file.document import PolicyDocument, read_policy, write_policy
from kvtune.simulator.quality.tables import Floats, SampleFacts, Tables

FORMAT = 1
_AGAIN = "remove the file to make it again."
_DTYPES = {
    "loss_root": np.float16,
    "factor_codes": np.int8,
    "factor_scale": np.float16,
    "group": np.int64,
}


def save_tables(tables: Tables, path: Path, provenance: dict[str, Any]) -> None:
    """Write tables atomically.

    Args:
        tables: what to write.
        path: ``*.safetensors``.
        provenance: plain data on how they came about, kept beside them.
    """
    codes, scale = _coded(tables.factor)
    arrays = {
        "loss_root": np.sqrt(np.maximum(tables.loss, 0)).astype(np.float16),
        "factor_codes": codes,
        "factor_scale": (scale * _SCALE_UNIT).astype(np.float16),
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
        temporary.write_bytes(save(arrays, metadata={"kvtune_tables": json.dumps(about)}))


def _coded(factor: Floats) -> tuple[NDArray[np.int8], Floats]:
    """Codes ``[g, I, O, r]`` and scales ``[g, I, O]``; factors side by side, as they are large."""
    codes, scales = np.empty(factor.shape, np.int8), np.empty(factor.shape[:3], np.float32)

    def code(group: int) -> None:
        scale = np.abs(factor[group]).max(-1, keepdims=True) / 127
        codes[group] = np.round(factor[group] / np.maximum(scale, 1e-20))
        scales[group] = scale[..., 0]

    with ThreadPoolExecutor() as pool:
        list(pool.map(code, range(len(factor))))
    return codes, scales


def _decoded(codes: NDArray[np.int8], scales: NDArray[np.float16]) -> Floats:
    """Factors of these codes, likewise."""
    factor = np.empty(codes.shape, np.float32)

    def decode(group: int) -> None:
        scale = scales[group].astype(np.float32)[..., None] / _SCALE_UNIT
        np.multiply(codes[group], scale, out=factor[group])

    with ThreadPoolExecutor() as pool:
        list(pool.map(decode, range(len(codes))))
    return factor


_SCALE_UNIT = 1024.0  # lifts small scales out of float16's subnormal range


@dataclass(frozen=True)
class _Header:
    """What the file's metadata says of its arrays."""

    format: Literal[1]
    model: Name
    layers: Count
    kv_heads: Count
    head_dim: Count
    prompt_tokens: Count
    samples: tuple[SampleFacts, ...]
    options: str
    provenance: dict[str, Any]


def load_tables(path: Path) -> tuple[Tables, dict[str, Any]]:
    """Tables and their provenance.

    Raises:
        KvtuneError: missing, damaged, or written by a newer kvtune.
    """
    where = str(path)
    try:
        with safe_open(path, framework="numpy") as file:
            text = (file.metadata() or {}).get("kvtune_tables", "{}")
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, ValueError, TypeError, AttributeError) as error:
        raise KvtuneError("these tables cannot be read", where=where, hint=_AGAIN) from error
    about = parse_json(text, where, _AGAIN)
    found = about.get("format") if isinstance(about, dict) else None
    if isinstance(found, int) and found != FORMAT:
        raise KvtuneError(f"tables of format {found}, not {FORMAT}", where=where, hint=_AGAIN)
    header = checked(_Header, about, where, _AGAIN)
    menu = _menu(header.options, where)
    _check_arrays(header, len(menu), arrays, where)
    return _assemble(header, menu, arrays), header.provenance


def _menu(options: str, where: str) -> tuple[Option, ...]:
    try:
        menu = read_policy(f"{options}\n").policy
    except KvtuneError as error:
        raise KvtuneError(f"its options: {error.message}", where=where, hint=_AGAIN) from error
    if not isinstance(menu, Policy):
        raise KvtuneError("its options are no list", where=where, hint=_AGAIN)
    return menu.heads[0]


def _check_arrays(header: _Header, options: int, arrays: dict[str, Any], where: str) -> None:
    """Refuse arrays that do not fit the header, or hold what no measurement gives."""

    def refuse(message: str) -> NoReturn:
        raise KvtuneError(message, where=where, hint=_AGAIN)

    if set(arrays) != set(_DTYPES):
        refuse(f"the tables must hold {', '.join(sorted(_DTYPES))}")
    for name, dtype in _DTYPES.items():
        if arrays[name].dtype != dtype:
            refuse(f"{name!r} is of {arrays[name].dtype}, not {dtype}")
        if not np.isfinite(arrays[name]).all():
            refuse(f"{name!r} holds NaN or infinity")
    samples, heads = len(header.samples), header.layers * header.kv_heads
    group, codes = arrays["group"], arrays["factor_codes"]
    if group.shape != (samples,) or arrays["loss_root"].shape != (samples, heads, options):
        refuse("the losses do not fit the samples, heads and options of the header")
    if codes.ndim != 4 or codes.shape[1:3] != (heads, options):
        refuse("the factors do not fit the heads and options of the header")
    if arrays["factor_scale"].shape != codes.shape[:3]:
        refuse("the factors' scales do not fit the factors")
    if samples and not 0 <= group.min() <= group.max() < len(codes):
        refuse("a sample belongs to a group of factors that is not there")
    if (arrays["loss_root"] < 0).any() or (arrays["factor_scale"] < 0).any():
        refuse("a loss or a scale is negative")


def _assemble(header: _Header, menu: tuple[Option, ...], arrays: dict[str, Any]) -> Tables:
    return Tables(
        model=header.model,
        layers=header.layers,
        kv_heads=header.kv_heads,
        head_dim=header.head_dim,
        prompt_tokens=header.prompt_tokens,
        options=menu,
        samples=header.samples,
        loss=arrays["loss_root"].astype(np.float32) ** 2,
        factor=_decoded(arrays["factor_codes"], arrays["factor_scale"]),
        group=arrays["group"],
    )
