"""A model's attention in numbers: layers, heads, windows and rotary positions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from kvtune.common.bounds import Count, Finite, Name, NotNegative, Whole
from kvtune.common.errors import KvtuneError
from kvtune.common.stored import checked


@dataclass(frozen=True)
class Rope:
    """One rotary embedding, enough to turn a key back or to another position.

    Args:
        kind: transformers' ``rope_type``: ``default``, ``linear``, ``llama3``, ``yarn``...
        theta: base of the frequencies.
        scaling: the other rope parameters, as (name, value) pairs.
        attention_factor: cos and sin are multiplied by it.
        inverse_frequencies: radians a position for each pair (i, i + D/2) of dimensions [D/2].
    """

    kind: Name
    theta: NotNegative
    scaling: tuple[tuple[str, Any], ...]
    attention_factor: Finite
    inverse_frequencies: tuple[Finite, ...]


@dataclass(frozen=True)
class Geometry:
    """The attention shape of a model.

    Args:
        layers: L.
        query_heads: Hq.
        kv_heads: H.
        head_dim: D.
        scale: factor of the scores before the softmax.
        windows: per layer, sliding window in tokens, or None for full attention [L].
        ropes: the distinct rotary embeddings; empty for models without.
        rope_of_layer: per layer, index into ``ropes``, or None [L].
        vocab_size: rows of the output head.
        max_context: longest context in tokens that the model was made for.
    """

    layers: Count
    query_heads: Count
    kv_heads: Count
    head_dim: Count
    scale: Finite
    windows: tuple[Count | None, ...]
    ropes: tuple[Rope, ...]
    rope_of_layer: tuple[Whole | None, ...]
    vocab_size: Count
    max_context: Count

    @property
    def group(self) -> int:
        """G: query heads that share one KV head."""
        return self.query_heads // self.kv_heads

    def rope_at(self, layer: int) -> Rope | None:
        """The rotary embedding of a layer."""
        index = self.rope_of_layer[layer]
        return None if index is None else self.ropes[index]

    def as_dict(self) -> dict[str, Any]:
        """The form that goes into a manifest; ``geometry_from_dict`` reads it."""
        return asdict(self)


def geometry_from_dict(fields: Any, where: str = "") -> Geometry:
    """Read what ``Geometry.as_dict`` wrote, also after JSON turned tuples into lists.

    Raises:
        KvtuneError: something is missing, of the wrong kind, or does not fit the rest.
    """
    return fitting(checked(Geometry, fields, where), where)


def fitting(found: Geometry, where: str, hint: str | None = None) -> Geometry:
    """A geometry read from a file, its parts checked against each other.

    Raises:
        KvtuneError: they do not fit.
    """
    for name in ("windows", "rope_of_layer"):
        if len(getattr(found, name)) != found.layers:
            raise KvtuneError(f"{name} must have one entry a layer", where=where, hint=hint)
    if any(index is not None and index >= len(found.ropes) for index in found.rope_of_layer):
        raise KvtuneError("rope_of_layer names a rope that is not there", where=where, hint=hint)
    if found.query_heads % found.kv_heads:
        raise KvtuneError("kv_heads must divide query_heads", where=where, hint=hint)
    if any(2 * len(rope.inverse_frequencies) > found.head_dim for rope in found.ropes):
        raise KvtuneError("a rope has more frequencies than half a head", where=where, hint=hint)
    ropes = tuple(
        replace(rope, scaling=tuple((name, _tuples(value)) for name, value in rope.scaling))
        for rope in found.ropes
    )
    return replace(found, ropes=ropes)


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, (list, tuple)) else value


_PROJECTIONS = ("k_proj", "qkv_proj", "query_key_value", "c_attn")
"""Names by which attention modules hold what makes their keys."""


def read_geometry(model: Any) -> Geometry:
    """The geometry of a transformers causal language model.

    Raises:
        KvtuneError: its attention is not plain multi-head or grouped-query softmax attention.
    """
    config = model.config.get_text_config()
    if getattr(model.config, "is_encoder_decoder", False):
        raise _unsupported(model, "has an encoder")
    attentions = attention_modules(model)
    layers = _declared(model, config, "num_hidden_layers")
    if sorted(attentions) != list(range(layers)):
        raise _unsupported(
            model,
            f"has an attention that kvtune can capture in {len(attentions)} of {layers} layers",
        )
    first = attentions[0]
    query_heads = _declared(model, config, "num_attention_heads")
    head_dim = int(getattr(first, "head_dim", 0) or config.hidden_size // query_heads)
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * layers
    ropes, rope_of_layer = _ropes(model, config, kinds)
    return Geometry(
        layers=layers,
        query_heads=query_heads,
        kv_heads=_declared(model, config, "num_key_value_heads", query_heads) or query_heads,
        head_dim=head_dim,
        scale=float(getattr(first, "scaling", None) or head_dim**-0.5),
        windows=_windows(config, layers),
        ropes=ropes,
        rope_of_layer=rope_of_layer,
        vocab_size=_declared(model, config, "vocab_size"),
        max_context=_declared(model, config, "max_position_embeddings"),
    )


def check_shapes(
    geometry: Geometry, layer: int, q: Any, k: Any, v: Any, scale: float, window: int | None
) -> None:
    """Refuse a layer whose attention is not of the model's one shape.

    Args:
        geometry: of the model.
        layer: its index.
        q: queries [B, Hq, T, D].
        k: keys [B, H, T, D].
        v: values [B, H, T, D].
        scale: factor of the scores before the softmax.
        window: sliding window in tokens, or None.

    Raises:
        KvtuneError: names what differs.
    """
    found = [(x.shape[1], x.shape[3]) for x in (q, k, v)]
    heads, size = (geometry.query_heads, geometry.kv_heads, geometry.kv_heads), geometry.head_dim
    if found != [(count, size) for count in heads]:
        names = zip(("query", "key", "value"), found, strict=True)
        told = ", ".join(f"{count} {name} heads of {width}" for name, (count, width) in names)
        raise KvtuneError(
            f"layer {layer} has {told} channels, where the model's config says {heads[0]} query "
            f"and {heads[1]} KV heads of {size}",
            hint="heads that differ by layer, or between keys and values, are not supported yet.",
        )
    if abs(scale - geometry.scale) > 1e-6 * abs(geometry.scale):
        raise KvtuneError(
            f"layer {layer} scales its scores by {scale}, where layer 0 declares {geometry.scale}"
        )
    if window != geometry.windows[layer]:
        raise KvtuneError(
            f"layer {layer} slides over {window} tokens, where the model's config says "
            f"{geometry.windows[layer]}"
        )


def _unsupported(model: Any, why: str) -> KvtuneError:
    return KvtuneError(
        f"{type(model).__name__} {why}",
        hint="models with plain softmax attention work: Llama, Qwen, Mistral, Gemma-3.",
    )


def _declared(model: Any, config: Any, name: str, otherwise: int | None = None) -> int:
    """A number that the configuration states once for all layers."""
    try:
        found: int | None = getattr(config, name, otherwise)
    except Exception as error:  # transformers raises several kinds where layers differ
        raise _unsupported(model, f"has another {name} in some layers") from error
    if found is None:
        raise _unsupported(model, f"has a config without {name}")
    return found


def attention_modules(model: Any) -> dict[int, Any]:
    """Attention modules by layer: those with query, key and value projections and an index."""
    found = {}
    for module in model.modules():
        index = getattr(module, "layer_idx", None)
        projected = any(hasattr(module, name) for name in _PROJECTIONS)
        if isinstance(index, int) and projected:
            found[index] = module
    return found


def _windows(config: Any, layers: int) -> tuple[int | None, ...]:
    window = getattr(config, "sliding_window", None)
    if not getattr(config, "use_sliding_window", True):
        window = None
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        return (window,) * layers
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def _ropes(
    model: Any, config: Any, kinds: list[str]
) -> tuple[tuple[Rope, ...], tuple[int | None, ...]]:
    """Rotary facts as the model's own module computed them; one a layer kind where they differ."""
    rotary = getattr(model.base_model, "rotary_emb", None)
    parameters = getattr(config, "rope_parameters", None)
    if rotary is None or not parameters:
        return (), (None,) * len(kinds)
    if hasattr(rotary, "inv_freq"):
        rope = _rope(parameters, rotary.inv_freq, rotary.attention_scaling)
        return (rope,), (0,) * len(kinds)
    names = sorted(set(kinds))
    ropes = tuple(
        _rope(
            parameters[name],
            getattr(rotary, f"{name}_inv_freq"),
            getattr(rotary, f"{name}_attention_scaling"),
        )
        for name in names
    )
    return ropes, tuple(names.index(kind) for kind in kinds)


def _rope(parameters: Mapping[str, Any], inverse_frequencies: Any, factor: float) -> Rope:
    rest = {k: v for k, v in parameters.items() if k not in ("rope_type", "rope_theta")}
    return Rope(
        kind=str(parameters.get("rope_type", "default")),
        theta=float(parameters["rope_theta"]),
        scaling=tuple((name, _tuples(rest[name])) for name in sorted(rest)),
        attention_factor=float(factor),
        inverse_frequencies=tuple(float(f) for f in inverse_frequencies.detach().cpu().tolist()),
    )
