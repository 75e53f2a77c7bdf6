"""Flags of ``llama-server``, as people give them, read for what they say of memory."""

from __future__ import annotations

import argparse
import shlex
from typing import TYPE_CHECKING, NoReturn

from kvtune.common.errors import KvtuneError, nearest
from kvtune.common.units import parse_tokens

if TYPE_CHECKING:
    from kvtune.simulator.memory.llama_memory import LlamaFlags

_HINT = "--engine-args '-c 32768 -ub 512 -fa on -ctk q8_0 -ctv q8_0 -np 4'"
_ON, _OFF = ("on", "1", "auto", "enabled"), ("off", "0", "disabled")


def read_llama_args(text: str) -> tuple[LlamaFlags, tuple[str, ...]]:
    """The flags that decide what is allocated, and the words that are not read.

    Raises:
        KvtuneError: the words cannot be taken apart, or a value makes no sense.
    """
    from kvtune.simulator.memory.llama_memory import LlamaFlags

    try:
        words = shlex.split(text)
    except ValueError as error:
        raise KvtuneError(f"--engine-args cannot be read: {error}", hint=_HINT) from error
    known, others = _parser().parse_known_args(words)
    return LlamaFlags(**vars(known)), tuple(others)


class _Parser(argparse.ArgumentParser):
    """An argument parser that raises mistakes as ``KvtuneError``."""

    def error(self, message: str) -> NoReturn:
        raise KvtuneError(f"--engine-args: {message}", hint=_HINT)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("-c", "--ctx-size", type=_context)
    parser.add_argument("-ub", "--ubatch-size", type=_tokens, default=512, dest="ubatch")
    parser.add_argument(
        "-fa", "--flash-attn", type=_flash, default=True, dest="flash", nargs="?", const=True
    )
    parser.add_argument("-ctk", "--cache-type-k", type=_kind, default="f16", dest="key_type")
    parser.add_argument("-ctv", "--cache-type-v", type=_kind, default="f16", dest="value_type")
    parser.add_argument("-np", "--parallel", type=_slots, default=1, dest="slots")
    parser.add_argument("-kvu", "--kv-unified", action="store_true", dest="unified")
    parser.add_argument("--swa-full", action="store_true")
    return parser


def _context(text: str) -> int | None:
    """Tokens; 0 for what the server chooses."""
    return None if text == "0" else _tokens(text)


def _tokens(text: str) -> int:
    try:
        return parse_tokens(text)
    except KvtuneError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _slots(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 5) or not 1 <= int(text) <= 256:
        raise argparse.ArgumentTypeError(f"{text[:20]} is no number of slots from 1 to 256")
    return int(text)


def _flash(text: str) -> bool:
    if text.lower() not in (*_ON, *_OFF):
        raise argparse.ArgumentTypeError(f"{text[:20]} is none of on, off and auto")
    return text.lower() in _ON


def _kind(text: str) -> str:
    from kvtune.simulator.memory.llama_memory import CACHE_BYTES

    if text.lower() not in CACHE_BYTES:
        raise argparse.ArgumentTypeError(
            f"{text[:20]} is no type of llama.cpp's cache. {nearest(text, list(CACHE_BYTES))}"
        )
    return text.lower()
