"""A model's shape from a GGUF file's own header."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kvtune.common.errors import KvtuneError
from kvtune.profiles.shape import ModelShape, alternating_windows

_HINT = "a Hugging Face folder of the same model works too."


def shape_from_gguf(path: Path) -> ModelShape:
    """The shape that a GGUF file's metadata and tensor names describe.

    Raises:
        KvtuneError: no such file, no GGUF, a mixture of experts, or a key is missing.
    """
    if not path.is_file():
        raise KvtuneError("there is no such file", where=str(path))
    import gguf

    try:
        reader = gguf.GGUFReader(path)
    except (ValueError, OSError, IndexError) as error:
        raise KvtuneError("this is no readable GGUF file", where=str(path), hint=_HINT) from error
    return _shape(_Header(reader, path))


class _Header:
    """The keys of one file, those of its architecture without their prefix."""

    def __init__(self, reader: Any, path: Path) -> None:
        self.fields, self.path = reader.fields, path
        self.tensors = {tensor.name: tensor for tensor in reader.tensors}
        self.architecture = str(self.fields["general.architecture"].contents())

    def count(self, key: str, default: int | None = None) -> int:
        """A whole number of the architecture's."""
        field = self.fields.get(f"{self.architecture}.{key}")
        value = default if field is None else field.contents()
        if isinstance(value, list) and len(set(value)) == 1:
            value = value[0]
        if not isinstance(value, int):
            raise KvtuneError(f"the key {key!r} is missing", where=str(self.path), hint=_HINT)
        return value


def _shape(header: _Header) -> ModelShape:
    if header.count("expert_count", 0):
        raise KvtuneError(
            "mixtures of experts are not read from GGUF", where=str(header.path), hint=_HINT
        )
    heads, hidden = header.count("attention.head_count"), header.count("embedding_length")
    layers = header.count("block_count")
    window = header.count("attention.sliding_window", 0) or None
    return ModelShape(
        name=header.path.stem.lower(),
        layers=layers,
        query_heads=heads,
        kv_heads=header.count("attention.head_count_kv", heads),
        head_dim=header.count("attention.key_length", hidden // heads),
        hidden_size=hidden,
        intermediate_size=header.count("feed_forward_length"),
        vocab_size=int(header.tensors["token_embd.weight"].shape[-1]),
        max_context=header.count("context_length"),
        tied_embeddings="output.weight" not in header.tensors,
        windows=alternating_windows(layers, window, None),
        biases="qkv" if "blk.0.attn_q.bias" in header.tensors else "none",
        query_key_norm="blk.0.attn_q_norm.weight" in header.tensors,
        source=header.path.name,
    )
