"""What other tools found for a model, as a policy: to run beside a plan, or to edit.

    kvtuner        YAML, bits of keys and of values by layer (KVTuner, arXiv 2502.04420)
    duo-attention  TSV, a number a KV head: how much it needs all tokens (DuoAttention, arXiv
                   2410.10819; RLKV writes the same)
    budgets        .npy, a budget a KV head: a share of the prompt up to 1, tokens above

Each is read as its tool's published files are; nothing in them is run.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvtune.common.errors import KvtuneError
from kvtune.policies.format import Format
from kvtune.policies.formats.bf16 import Bf16
from kvtune.policies.formats.grouped import Int2, Int3, Int4, Int8
from kvtune.policies.methods.snapkv import SnapKV
from kvtune.policies.methods.streaming_llm import StreamingLLM
from kvtune.policies.option import ALL, Budget, Option
from kvtune.policies.policy import Policy

_SINKS, _RECENT = 64, 256  # of DuoAttention's streaming heads, as its authors deploy them
_THRESHOLD = 0.5
_KINDS: dict[int, type[Format]] = {2: Int2, 3: Int3, 4: Int4, 8: Int8, 16: Bf16}
_BITS: dict[int, Format] = {bits: kind() for bits, kind in _KINDS.items()}
_LARGEST_BYTES = 64 * 2**20


def read_foreign(path: Path, kind: str, layers: int, kv_heads: int) -> Policy:
    """A policy from another tool's file.

    Args:
        path: the file.
        kind: of ``READERS``.
        layers: L of the model.
        kv_heads: H.

    Raises:
        KvtuneError: unreadable, of another shape, or not what such files hold.
    """
    if not path.is_file():
        raise KvtuneError("no such file", where=str(path))
    if path.stat().st_size > _LARGEST_BYTES:
        raise KvtuneError("larger than any such file is", where=str(path))
    rows = READERS[kind](path)
    policy = Policy(f"{kind} of {path.name}", rows(kv_heads))
    policy.check_fits(layers, kv_heads)
    return policy


Rows = Callable[[int], tuple[tuple[Option, ...], ...]]  # of so many KV heads a layer


def _kvtuner(path: Path) -> Rows:
    """``0: {nbits_key: 8, nbits_value: 4}`` and so on, a layer each."""
    import yaml

    try:
        read = yaml.safe_load(path.read_text("utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise KvtuneError(f"not readable as YAML: {error}", where=str(path)) from error
    if not isinstance(read, dict) or sorted(read, key=str) != sorted(range(len(read)), key=str):
        raise KvtuneError(
            "not a number for each layer from 0 on", where=str(path), hint="is it KVTuner's?"
        )
    options = [_of_bits(read[layer], f"{path}: layer {layer}") for layer in range(len(read))]
    return lambda kv_heads: tuple((option,) * kv_heads for option in options)


def _of_bits(given: Any, where: str) -> Option:
    keys = {"nbits_key", "nbits_value"}
    if not isinstance(given, dict) or set(given) != keys:
        raise KvtuneError("nbits_key and nbits_value are wanted, and nothing else", where=where)
    pair = [given["nbits_key"], given["nbits_value"]]
    if unknown := [bits for bits in pair if isinstance(bits, bool) or bits not in _BITS]:
        known = ", ".join(map(str, _BITS))
        raise KvtuneError(f"no format of {unknown[0]!r} bits", where=where, hint=f"known: {known}.")
    return Option(keys=_BITS[pair[0]], values=_BITS[pair[1]])


def _duo_attention(path: Path) -> Rows:
    """Above one half a head keeps all tokens, else sinks and the newest."""
    try:
        table = np.loadtxt(path, delimiter="\t", ndmin=2)
    except ValueError as error:
        raise KvtuneError(f"no table of numbers: {error}", where=str(path)) from error
    streaming = Option(StreamingLLM(sinks=_SINKS), Budget(tokens=_SINKS + _RECENT))
    _check_finite(table, path)
    rows = tuple(tuple(Option() if x > _THRESHOLD else streaming for x in row) for row in table)
    return lambda _: rows


def _budgets(path: Path) -> Rows:
    """SnapKV with these budgets; nothing in the file is run."""
    try:
        table = np.load(path, allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise KvtuneError(f"no .npy of plain numbers: {error}", where=str(path)) from error
    if not isinstance(table, np.ndarray) or table.ndim != 2 or table.dtype.kind not in "fiu":
        raise KvtuneError("a table [layers, KV heads] of numbers is wanted", where=str(path))
    _check_finite(table, path)
    if (table < 0).any():
        raise KvtuneError("a budget is below 0", where=str(path))
    shares = bool((table <= 1).all())
    rows = tuple(tuple(_of_budget(float(x), shares) for x in row) for row in table)
    return lambda _: rows


def _of_budget(budget: float, is_share: bool) -> Option:
    if is_share and budget == 1:
        return Option(SnapKV(), ALL)
    if is_share and budget > 0:
        return Option(SnapKV(), Budget(share=budget))
    return Option(SnapKV(), Budget(tokens=round(budget)))


def _check_finite(table: NDArray[Any], path: Path) -> None:
    if not np.isfinite(table).all():
        raise KvtuneError("a number is not finite", where=str(path))


READERS: dict[str, Callable[[Path], Rows]] = {
    "kvtuner": _kvtuner,
    "duo-attention": _duo_attention,
    "budgets": _budgets,
}
