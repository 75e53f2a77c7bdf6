"""Flags of ``vllm serve``, as people give them, read for what they say of memory."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from kvtune.cli.engine_flags import FlagParser, split_flags, whole_number, with_flag_name
from kvtune.common.units import parse_tokens

if TYPE_CHECKING:
    from kvtune.simulator.memory.engine_memory import EngineFlags

_HINT = "--engine-args '--gpu-memory-utilization 0.9 --max-num-seqs 64 --kv-cache-dtype fp8'"
_KV_BYTES = {"auto": 2.0, "bfloat16": 2.0, "float16": 2.0, "fp8": 1.0}
_MOST_SEQUENCES = 2**20


def read_engine_args(text: str) -> tuple[EngineFlags, tuple[str, ...]]:
    """The flags that decide how much cache there is, and a note on words that are not read.

    Raises:
        KvtuneError: the words cannot be taken apart, or a value makes no sense.
    """
    from kvtune.simulator.memory.engine_memory import EngineFlags

    words = [_dashed(word) for word in split_flags(text, _HINT)]
    parser = _parser()
    known, others = parser.parse_known_args(words)
    return EngineFlags(**vars(known)), parser.unread_notes(others)


def _dashed(word: str) -> str:
    """vLLM takes ``--max_model_len`` for ``--max-model-len``."""
    name, equals, value = word.partition("=")
    return (name.replace("_", "-") if name.startswith("--") else name) + equals + value


def _parser() -> FlagParser:
    parser = FlagParser(_HINT)
    parser.add_argument("--gpu-memory-utilization", type=with_flag_name(_share))
    parser.add_argument("--max-model-len", type=with_flag_name(parse_tokens))
    parser.add_argument("--max-num-seqs", type=with_flag_name(_sequences))
    parser.add_argument("--max-num-batched-tokens", type=with_flag_name(parse_tokens))
    parser.add_argument(
        "--kv-cache-dtype", type=with_flag_name(_kv_bytes), default=2.0, dest="kv_cache_bytes"
    )
    parser.add_argument("--block-size", type=with_flag_name(_block), default=16)
    parser.add_argument("--enforce-eager", action="store_true")
    parser.add_argument("--enable-expert-parallel", action="store_true", dest="expert_parallel")
    parser.add_argument(
        "--kv-cache-memory-bytes", "--kv-cache-memory", type=with_flag_name(_bytes),
        dest="kv_cache_memory_bytes",
    )  # fmt: skip
    parser.add_argument(
        "--enable-prefix-caching", action=argparse.BooleanOptionalAction, dest="shares_states"
    )
    parser.add_argument(
        "--mamba-cache-mode", type=with_flag_name(_shares_states), dest="shares_states"
    )
    parser.add_argument(
        "--mamba-ssm-cache-dtype", type=with_flag_name(_state_bytes), dest="state_element_bytes"
    )
    return parser


def _share(text: str) -> float:
    share = float(text)
    if not 0 < share <= 1:
        raise ValueError(f"{text} is no share of the memory, above 0 and at most 1")
    return share


def _sequences(text: str) -> int:
    return whole_number(text, _MOST_SEQUENCES, "number of sequences")


def _block(text: str) -> int:
    return whole_number(text, 65_536, "number of tokens")


def _bytes(text: str) -> int:
    return whole_number(text, 2**50, "number of bytes")


def _shares_states(text: str) -> bool:
    modes = {"none": False, "align": True}
    if text not in modes:
        raise ValueError(f"states kept in mode {text[:20]!r} are not modelled: none and align are")
    return modes[text]


def _state_bytes(text: str) -> int | None:
    sizes = {"auto": None, "float32": 4, "float16": 2, "bfloat16": 2}
    if text not in sizes:
        raise ValueError(f"{text[:20]!r} is no type of a state: {', '.join(sizes)}")
    return sizes[text]


def _kv_bytes(text: str) -> float:
    for name, size in _KV_BYTES.items():
        if text.lower() == name or (name == "fp8" and text.lower().startswith("fp8_e")):
            return size
    raise ValueError(f"a cache in {text[:20]!r} is not modelled: {', '.join(_KV_BYTES)} are")
