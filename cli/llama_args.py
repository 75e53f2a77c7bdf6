"""Flags of ``llama-server``, as people give them, read for what they say of memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvtune.cli.engine_flags import FlagParser, split_flags, whole_number, with_flag_name
from kvtune.common.errors import nearest
from kvtune.common.units import parse_tokens

if TYPE_CHECKING:
    from kvtune.simulator.memory.llama_flags import LlamaFlags

_HINT = "--engine-args '-c 32768 -ub 512 -fa on -ctk q8_0 -ctv q8_0 -np 4'"
_ON, _OFF = ("on", "1", "auto", "enabled"), ("off", "0", "disabled")


def read_llama_args(text: str) -> tuple[LlamaFlags, tuple[str, ...]]:
    """The flags that decide what is allocated, and a note on words that are not read.

    Raises:
        KvtuneError: the words cannot be taken apart, or a value makes no sense.
    """
    from kvtune.simulator.memory.llama_flags import LlamaFlags

    parser = _parser()
    known, others = parser.parse_known_args(split_flags(text, _HINT))
    return LlamaFlags(**vars(known)), parser.unread_notes(others)


def _parser() -> FlagParser:
    parser = FlagParser(_HINT)
    parser.add_argument("-c", "--ctx-size", type=with_flag_name(_context))
    parser.add_argument(
        "-ub", "--ubatch-size", type=with_flag_name(parse_tokens), default=512, dest="ubatch"
    )
    parser.add_argument(
        "-fa",
        "--flash-attn",
        type=with_flag_name(_flash),
        default=True,
        dest="flash",
        nargs="?",
        const=True,
    )
    parser.add_argument(
        "-ctk", "--cache-type-k", type=with_flag_name(_kind), default="f16", dest="key_type"
    )
    parser.add_argument(
        "-ctv", "--cache-type-v", type=with_flag_name(_kind), default="f16", dest="value_type"
    )
    parser.add_argument("-np", "--parallel", type=with_flag_name(_slots), default=1, dest="slots")
    parser.add_argument("-kvu", "--kv-unified", action="store_true", dest="unified")
    parser.add_argument("--swa-full", action="store_true")
    parser.add_argument(
        "-ngl", "--n-gpu-layers", "--gpu-layers", type=with_flag_name(_layers), dest="gpu_layers"
    )
    parser.add_argument("-nkvo", "--no-kv-offload", action="store_false", dest="cache_on_gpu")
    return parser


def _context(text: str) -> int | None:
    """Tokens; 0 for what the server chooses."""
    return None if text == "0" else parse_tokens(text)


def _layers(text: str) -> int | None:
    """Layers on the GPU; None for all."""
    if text.lower() in ("-1", "all", "auto"):
        return None
    return 0 if text == "0" else whole_number(text, 2**31 - 1, "number of layers")


def _slots(text: str) -> int:
    return whole_number(text, 256, "number of slots")


def _flash(text: str) -> bool:
    if text.lower() not in (*_ON, *_OFF):
        raise ValueError(f"{text[:20]} is none of on, off and auto")
    return text.lower() in _ON


def _kind(text: str) -> str:
    from kvtune.simulator.memory.llama_flags import CACHE_BYTES

    if text.lower() not in CACHE_BYTES:
        raise ValueError(
            f"{text[:20]} is no type of llama.cpp's cache. {nearest(text, list(CACHE_BYTES))}"
        )
    return text.lower()
