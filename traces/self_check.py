"""Whether a model answers through kvtune as it answers by itself: tried before it is accepted.

The model's own eager attention answers a short random prompt first, and what each attention module
gives is kept. The same prompt is then run through kvtune's attention. Each module's output is
compared and replaced by the kept one, so that every layer is tried on the very same inputs and
rounding cannot add up over the depth. The reference side uses none of kvtune's code.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvtune.common.errors import KvtuneError
from kvtune.traces.geometry import Geometry, attention_modules
from kvtune.traces.masks import MaskFunction, check_reach, watching

if TYPE_CHECKING:
    from torch import Tensor

SHORTEST = 8
LONGEST = 264
"""Tokens of the random prompt; a longer window is checked by its mask's description alone."""

EXACT, ROUNDED, STORED = 1e-3, 0.06, 0.25
"""Largest relative difference of a token: in fp32, in half precision, read back from bf16 pages."""

HINT = "models with plain softmax attention work: Llama, Qwen, Mistral, Gemma-3."

_checked: weakref.WeakKeyDictionary[Any, set[str]] = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class Part:
    """Some of the prompt's tokens, and how closely they must agree.

    Args:
        start: first token.
        stop: behind the last.
        stored: whether keys and values were rounded when they were stored.
    """

    start: int
    stop: int
    stored: bool = False


Ask = Callable[["Tensor", Part], "Tensor"]
"""Runs some tokens ``[1, T]`` of the prompt through kvtune; gives logits ``[1, T, vocabulary]``."""


def require_same(
    model: Any, geometry: Geometry, name: str, ask: Ask, stored_last: bool = False
) -> None:
    """Refuse a model that kvtune's attention does not answer for as its own does. Once a model.

    Args:
        model: a transformers causal language model; as it was when this returns.
        geometry: of it.
        name: kvtune's attention implementation, as transformers knows it.
        ask: runs the prompt's parts.
        stored_last: run the last token by itself, from what was stored of those before.

    Raises:
        KvtuneError: says where it differs, and by how much.
    """
    if name in _checked.get(model, ()):
        return
    with _evaluating(model):
        if _compare(model, geometry, name, ask, stored_last):
            _checked.setdefault(model, set()).add(name)


def _compare(model: Any, geometry: Geometry, name: str, ask: Ask, stored_last: bool) -> bool:
    """Whether there was something to compare; raises where it differs."""
    ids = _prompt(model, geometry)
    tokens = ids.shape[1]
    kept = _reference(model, ids)
    if not bool(kept.logits.isfinite().all()):
        return False  # a cache will name the layer and head when it reads a prompt
    parts = [Part(0, tokens)]
    if stored_last:
        parts = [Part(0, tokens - 1), Part(tokens - 1, tokens, stored=True)]

    # A mask may be made that no layer takes, of a window that is switched off.
    declared = getattr(model.config.get_text_config(), "sliding_window", None)

    def watch(mask: MaskFunction) -> None:
        check_reach(mask, {*geometry.windows, declared}, ids.device)

    with answering(model, name), watching(watch):
        for part in parts:
            with _compared(model, geometry, kept, part):
                logits = _run(model, ask, ids[:, part.start : part.stop], part)
            expected = kept.logits[:, part.start : part.stop]
            _refuse_difference(model, "the logits", logits, expected, stored=False)
    return True


def _prompt(model: Any, geometry: Geometry) -> Tensor:
    """Random tokens ``[1, N]``, more than a short window holds."""
    import torch

    reaches = [w + 8 for w in geometry.windows if w is not None and w + 8 < LONGEST]
    tokens = min(max([SHORTEST, *reaches]), geometry.max_context - 1) + 1
    draw = torch.Generator().manual_seed(0)
    return torch.randint(geometry.vocab_size, (1, tokens), generator=draw).to(model.device)


@dataclass(frozen=True)
class _Reference:
    """What the model's own attention gives.

    Args:
        outputs: of each attention module ``[1, N, hidden]``, by layer.
        logits: ``[1, N, vocabulary]``.
    """

    outputs: dict[int, Tensor]
    logits: Tensor


def _reference(model: Any, ids: Tensor) -> _Reference:
    outputs: dict[int, Tensor] = {}

    def keep(layer: int, output: Tensor) -> Tensor:
        outputs[layer] = output
        return output

    def ask(ids: Tensor, _: Part) -> Tensor:
        logits: Tensor = model(input_ids=ids, use_cache=False).logits
        return logits

    with answering(model, "eager"), _hooked(model, keep):
        return _Reference(outputs, _run(model, ask, ids, Part(0, ids.shape[1])))


@contextmanager
def _compared(model: Any, geometry: Geometry, kept: _Reference, part: Part) -> Iterator[None]:
    """Compare and replace each attention module's output until the block ends."""
    calls: list[int] = []

    def compare(layer: int, output: Tensor) -> Tensor:
        calls.append(layer)
        expected = kept.outputs[layer][:, part.start : part.stop]
        _refuse_difference(model, f"the attention of layer {layer}", output, expected, part.stored)
        return expected

    with _hooked(model, compare):
        yield
    if calls != list(range(geometry.layers)):
        raise KvtuneError(
            f"{type(model).__name__} calls its attention in the order {calls[:8]}..., not once "
            "in each layer",
            hint=HINT,
        )


@contextmanager
def _hooked(model: Any, each: Callable[[int, Tensor], Tensor]) -> Iterator[None]:
    """Put every attention module's output through ``each`` until the block ends."""

    def hook_of(layer: int) -> Callable[..., Any]:
        def hook(_: Any, __: Any, output: Any) -> Any:
            if isinstance(output, tuple):
                return each(layer, output[0]), *output[1:]
            return each(layer, output)

        return hook

    hooks = [
        module.register_forward_hook(hook_of(layer))
        for layer, module in attention_modules(model).items()
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _run(model: Any, ask: Ask, ids: Tensor, part: Part) -> Tensor:
    """Run it, and say in a sentence what the model's own code cannot do."""
    import torch

    try:
        with torch.inference_mode(False), torch.no_grad():
            return ask(ids, part)
    except (KvtuneError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # a model's code may fail in any way under an attention not its own
        said = (str(error).strip().splitlines() or [""])[0]
        raise KvtuneError(
            f"{type(model).__name__} does not run through kvtune's attention "
            f"({type(error).__name__}: {said})",
            hint=HINT,
        ) from error


def _refuse_difference(
    model: Any, what: str, found: Tensor, expected: Tensor, stored: bool
) -> None:
    import torch

    limit = EXACT if model.dtype == torch.float32 else ROUNDED
    limit = max(limit, STORED) if stored else limit
    difference = _difference(found, expected)
    if difference > limit:
        raise KvtuneError(
            f"kvtune would answer wrongly for {type(model).__name__}: {what} differs from the "
            f"model's own by {difference:.2g} of its size on a random prompt",
            hint=HINT,
        )


def _difference(found: Tensor, expected: Tensor) -> float:
    """Of the worst token: the length of the difference over the length of what is expected."""
    if found.shape != expected.shape:
        return float("inf")
    found, expected = found.float(), expected.float()
    size = expected.norm(dim=-1)
    size = size.clamp_min(1e-3 * float(size.mean()) + 1e-12)
    gap = (found - expected).norm(dim=-1) / size
    return float(gap.nan_to_num(nan=float("inf")).max())


@contextmanager
def answering(model: Any, name: str) -> Iterator[None]:
    """Let an attention implementation answer until the block ends; then the former one.

    Raises:
        KvtuneError: the model cannot change its attention.
    """
    config = model.config.get_text_config()
    before = config._attn_implementation
    try:
        set_attention(model, name)
        yield
    finally:
        model.set_attn_implementation(before)


def set_attention(model: Any, name: str) -> None:
    """Let an attention implementation answer from now on.

    Raises:
        KvtuneError: the model cannot change its attention.
    """
    try:
        model.set_attn_implementation(name)
    except (ValueError, NotImplementedError, ImportError) as error:
        raise _fixed_attention(model) from error
    if model.config.get_text_config()._attn_implementation != name:
        raise _fixed_attention(model)


def _fixed_attention(model: Any) -> KvtuneError:
    return KvtuneError(
        f"{type(model).__name__} computes its attention itself, and lets nobody else answer",
        hint=HINT,
    )


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """Without dropout until the block ends."""
    training: Sequence[Any] = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
