"""Fewer, larger launches around an unmodified model while it decodes; everything is put back.

Norms, rotary embedding and gated activations become one kernel each; q, k, v and gate, up become
one matrix product each, over weights that are laid side by side once (the modules' own weights are
then views of them, so that no memory is added). Where a layer's residual sums are known to be plain
ones, each is made by the norm that follows it; rotation is left to the launch that writes the
rotated keys into pages, where there is one.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from kvtune.runtime.rotation import rotate_later

_TANH = {"gelu_pytorch_tanh", "gelu_tanh"}
_ACTIVATIONS = {"silu", "swish", *_TANH}
_PLAIN_SUMS = {f"{family}DecoderLayer" for family in ("Llama", "Mistral", "Qwen2", "Qwen3")}


@contextmanager
def fused(model: Any) -> Iterator[None]:
    """Fuse what is known of a Llama-family model until the block ends; the rest stays as it is."""
    from kvtune.runtime.kernels.elementwise import add_rms_norm, gated, rms_norm

    config = model.config.get_text_config()
    activation = getattr(config, "hidden_act", None) or getattr(config, "hidden_activation", "")
    with ExitStack() as undo:
        for module in model.modules():
            name = type(module).__name__
            if name.endswith("RMSNorm"):
                _replace(undo, module, _norm(module, "Gemma" in name, rms_norm))
            if _has(module, "q_proj", "k_proj", "v_proj"):
                _join(undo, [module.q_proj, module.k_proj, module.v_proj])
            if _has(module, "gate_proj", "up_proj", "down_proj") and activation in _ACTIVATIONS:
                _join(undo, [module.gate_proj, module.up_proj])
                _replace(undo, module, _mlp(module, activation in _TANH, gated))
        _chain(undo, [m for m in model.modules() if type(m).__name__ in _PLAIN_SUMS], add_rms_norm)
        _replace_rotary(undo, sys.modules[type(model).__module__])
        yield


def fused_on_gpu(model: Any) -> AbstractContextManager[None]:
    """The same for a model on a GPU, where there is Triton; elsewhere nothing."""
    there = model.device.type == "cuda" and importlib.util.find_spec("triton")
    return fused(model) if there else nullcontext()


def _has(module: nn.Module, *names: str) -> bool:
    return all(type(getattr(module, name, None)) is nn.Linear for name in names)


def _replace(undo: ExitStack, module: nn.Module, forward: Callable[..., Any]) -> None:
    module.forward = forward
    undo.callback(lambda: module.__dict__.pop("forward"))


def _norm(
    module: Any, shifted: bool, rms_norm: Callable[..., Tensor]
) -> Callable[[Tensor], Tensor]:
    return lambda x: rms_norm(x, module.weight, _eps(module), shifted)


def _eps(module: Any) -> float:
    eps: float = getattr(module, "variance_epsilon", None) or module.eps
    return eps


def _mlp(module: Any, tanh: bool, gated: Callable[..., Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda x: module.down_proj(gated(module.gate_proj(x), module.up_proj(x), tanh))


def _join(undo: ExitStack, linears: Sequence[Any]) -> None:
    """The first of the layers computes all of them; the others then give their part."""
    sizes = [len(linear.weight) for linear in linears]
    weight = _side_by_side([linear.weight for linear in linears])
    biases = [linear.bias for linear in linears]
    bias = None if biases[0] is None else _side_by_side(biases)
    parts: dict[int, Tensor] = {}

    def first(x: Tensor) -> Tensor:
        together = nn.functional.linear(x, weight, bias).split(sizes, -1)
        parts.update(enumerate(together))
        return parts.pop(0)

    _replace(undo, linears[0], first)
    for n, linear in enumerate(linears[1:], start=1):
        _replace(undo, linear, lambda x, n=n: parts.pop(n))


def _side_by_side(parameters: Sequence[Tensor]) -> Tensor:
    """One tensor of all rows, of which the parameters become views.

    Those that lie so already stay where they are: weights that moved at every call would end up in
    the memory of some cache that is gone, and keep all of it from being given back.
    """
    sizes, first = [len(parameter) for parameter in parameters], parameters[0].data
    if _are_side_by_side(parameters):
        return first.as_strided((sum(sizes), *first.shape[1:]), first.stride())
    together = torch.cat([parameter.data for parameter in parameters])
    for parameter, part in zip(parameters, together.split(sizes), strict=True):
        parameter.data = part
    return together


def _are_side_by_side(parameters: Sequence[Tensor]) -> bool:
    one_storage = len({p.untyped_storage().data_ptr() for p in parameters}) == 1
    meet = all(a.data_ptr() + a.nbytes == b.data_ptr() for a, b in pairwise(parameters))
    return one_storage and meet and all(p.is_contiguous() for p in parameters)


def _chain(undo: ExitStack, layers: Sequence[Any], add_norm: Callable[..., Any]) -> None:
    """Each layer leaves the next one its input already normalised."""
    ready: dict[int, Tensor] = {}

    def forward(at: int, hidden: Tensor, **kwargs: Any) -> Tensor:
        layer = layers[at]
        normed = ready.pop(at) if at else layer.input_layernorm(hidden)
        attended, _ = layer.self_attn(hidden_states=normed, **kwargs)
        norm = layer.post_attention_layernorm
        hidden, normed = add_norm(hidden, attended, norm.weight, _eps(norm))
        del attended  # as large as the whole prompt, while the feed-forward part takes its room
        fed: Tensor = layer.mlp(normed)
        if at + 1 == len(layers):
            return hidden + fed
        norm = layers[at + 1].input_layernorm
        hidden, ready[at + 1] = add_norm(hidden, fed, norm.weight, _eps(norm))
        return hidden

    for at, layer in enumerate(layers):
        _replace(undo, layer, partial(forward, at))


def _replace_rotary(undo: ExitStack, modeling: Any) -> None:
    original = getattr(modeling, "apply_rotary_pos_emb", None)
    if original is None or not _turns_halves(modeling):
        return

    def apply(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any) -> Any:
        one_token = q.shape[2] == 1 and cos.shape[-1] == q.shape[-1] and not (args or kwargs)
        if one_token:
            return rotate_later(q, k, cos, sin)
        return original(q, k, cos, sin, *args, **kwargs)

    modeling.apply_rotary_pos_emb = apply
    undo.callback(lambda: setattr(modeling, "apply_rotary_pos_emb", original))


def _turns_halves(modeling: Any) -> bool:
    """Whether channels turn with those half a head away, as in the kernel; Cohere's do not."""
    turn = getattr(modeling, "rotate_half", None)
    return turn is not None and turn(torch.arange(4.0)).tolist() == [-2.0, -3.0, 0.0, 1.0]
