"""The model shapes that kvtune knows by name: one YAML table a family, found by name or alias."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any

from kvtune.common.errors import KvtuneError, nearest
from kvtune.profiles.layer_cache import LatentAttention, LayerCache
from kvtune.profiles.model_config import shape_from_config
from kvtune.profiles.parameter_counts import Experts, ParameterCounts
from kvtune.profiles.shape import ModelShape, alternating_windows
from kvtune.profiles.strict import Located, library

__all__ = [
    "Experts",
    "LatentAttention",
    "ModelShape",
    "ParameterCounts",
    "find_model",
    "list_models",
    "shape_from_config",
    "shape_from_record",
]

_COUNTS = (
    "layers", "query_heads", "kv_heads", "head_dim", "hidden_size", "intermediate_size",
    "vocab_size", "max_context",
)  # fmt: skip
_REQUIRED = (*_COUNTS, "tied_embeddings", "source")
_OPTIONAL = (
    "aliases", "window", "full_every", "latent", "experts", "biases", "query_key_norm",
    "norms_over_heads", "norms_per_layer", "sinks", "other_parameters", "rotary_elements",
    "cache", "counted",
)  # fmt: skip
_SUFFIX = re.compile(  # what a repository's name says beside the shape: tuning, weights' format
    r"-(instruct|thinking|it|chat|hf|base|pt|gguf|bf16|fp8|nvfp4|mxfp4|awq|gptq|qat|int4|int8|q\d(-\w){0,2})$"
)


def list_models() -> tuple[ModelShape, ...]:
    """Every known shape, by name."""
    return _models()


def find_model(name: str) -> ModelShape:
    """The shape of a model by name, alias or hub id, or as Ollama writes it.

    Case, the organisation, ``-instruct`` and the weights' format do not matter.

    Raises:
        KvtuneError: no such model; the message names the nearest ones.
    """
    known = _names()
    key = shorter = _normal(name)
    while shorter not in known and _SUFFIX.search(shorter):
        shorter = _SUFFIX.sub("", shorter)
    if shorter in known:
        return known[shorter]
    listed = [each for shape in _models() for each in (shape.name, *shape.aliases)]
    raise KvtuneError(
        f"no model is known as {name!r}. {nearest(key, listed)}",
        hint="kvtune models lists them; a folder with a config.json works too.",
    )


def model_of_size(layers: int, hidden_size: int, intermediate_size: int) -> ModelShape | None:
    """The first known shape of so many layers of these widths; None where there is none."""
    wanted = layers, hidden_size, intermediate_size
    same = (s for s in _models() if (s.layers, s.hidden_size, s.intermediate_size) == wanted)
    return next(same, None)


def shape_from_record(name: str, record: Located) -> ModelShape:
    """One strict record of a family table.

    Raises:
        KvtuneError: a key is unknown, missing or of the wrong kind; with file, line and key.
    """
    fields = record.mapping(_REQUIRED, _OPTIONAL)
    counts: dict[str, Any] = {key: fields[key].count() for key in _COUNTS}
    if counts["query_heads"] % counts["kv_heads"]:
        fields["kv_heads"].fail(f"must divide query_heads ({counts['query_heads']})")
    cache = _cache(fields["cache"], counts["layers"]) if "cache" in fields else ()
    window = fields["window"].count() if "window" in fields else None
    full_every = fields["full_every"].count(2) if "full_every" in fields else None
    return ModelShape(
        name=name,
        **counts,
        tied_embeddings=fields["tied_embeddings"].flag(),
        windows=tuple(layer.window for layer in cache)
        or alternating_windows(counts["layers"], window, full_every),
        cache=cache,
        source=fields["source"].text(),
        **_optional_fields(fields),
    )


def _optional_fields(fields: dict[str, Located]) -> dict[str, Any]:
    return {key: read(fields[key]) for key, read in _READERS.items() if key in fields}


def _cache(record: Located, layers: int) -> tuple[LayerCache, ...]:
    """What each layer caches: kinds by letter, and a letter a layer."""
    fields = record.mapping(("kinds", "layers"))
    kinds = {letter: _kind(kind) for letter, kind in fields["kinds"].entries()}
    order = fields["layers"].text()
    if len(order) != layers or set(order) != set(kinds):
        fields["layers"].fail(f"must have a letter of {', '.join(kinds)} for each layer")
    return tuple(kinds[letter] for letter in order)


def _kind(record: Located) -> LayerCache:
    fields = record.mapping((), tuple(LayerCache.__dataclass_fields__))
    return LayerCache(**{key: entry.count(0) for key, entry in fields.items()})


def _counted(record: Located) -> ParameterCounts:
    keys = tuple(ParameterCounts.__dataclass_fields__)
    fields = record.mapping(keys[:-1], keys[-1:])
    return ParameterCounts(**{key: entry.count(0) for key, entry in fields.items()})


def _latent(record: Located) -> LatentAttention:
    keys = ("kv_lora_rank", "rope_dim", "nope_dim", "value_dim")
    fields = record.mapping(keys, ("query_lora_rank",))
    return LatentAttention(**{key: entry.count() for key, entry in fields.items()})


def _experts(record: Located) -> Experts:
    numbers, flags = ("shared_size", "dense_layers"), ("biases", "score_correction")
    fields = record.mapping(("count", "active", "intermediate_size"), (*numbers, *flags))
    if fields["active"].count() > fields["count"].count():
        fields["active"].fail("must not be above the number of experts")
    values: dict[str, Any] = {
        key: entry.flag() if key in flags else entry.count(0 if key in numbers else 1)
        for key, entry in fields.items()
    }
    return Experts(**values)


_READERS: dict[str, Callable[[Located], object]] = {
    "aliases": lambda entry: entry.texts(),
    "latent": _latent,
    "experts": _experts,
    "biases": lambda entry: entry.text(("none", "qkv", "all")),
    "query_key_norm": lambda entry: entry.flag(),
    "norms_over_heads": lambda entry: entry.flag(),
    "norms_per_layer": lambda entry: entry.count(),
    "sinks": lambda entry: entry.flag(),
    "other_parameters": lambda entry: entry.count(0),
    "rotary_elements": lambda entry: entry.count(),
    "counted": _counted,
}


@functools.cache
def _models() -> tuple[ModelShape, ...]:
    records = [entry for _, table in library("models") for entry in table.entries()]
    shapes = [shape_from_record(name, record) for name, record in records]
    return tuple(sorted(shapes, key=lambda shape: shape.name))


@functools.cache
def _names() -> dict[str, ModelShape]:
    known: dict[str, ModelShape] = {}
    for shape in _models():
        for name in (shape.name, *shape.aliases):
            if known.setdefault(_normal(name), shape) is not shape:
                raise KvtuneError(f"two models answer to {name!r}", where="profiles/models")
    return known


def _normal(name: str) -> str:
    """Lower case, without the organisation, with hyphens only: ``llama3.1-8b`` of all spellings."""
    last = re.sub(r"[_ :]", "-", name.strip().lower().rstrip("/").rsplit("/", 1)[-1])
    last = re.sub(r"^(meta|nvidia)-(?=[a-z])", "", last)
    return re.sub(r"(?<=[a-z])-(?=\d)", "", last)
