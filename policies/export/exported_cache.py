"""A KV-cache policy for Hugging Face transformers: all it needs is torch and ``kv_cache.json``.

::

    import kv_cache
    kv_cache.apply(model)                                             # once
    model.generate(**inputs, past_key_values=kv_cache.build_cache())  # or cache=, from 5.24

The first forward pass is the prompt: in one piece, without padding. When a layer has answered it,
each KV head keeps its tokens in its format; generated tokens stay as they are. Stored tokens are
read back at every step, so memory is saved and time is not. No beam search, no cropping.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, Cache, CacheLayerMixin

NAME = "kvtune_policy"


def load(path: Path | None = None) -> dict[str, Any]:
    """The policy beside this file, or another one."""
    text = (path or Path(__file__).with_name("kv_cache.json")).read_text(encoding="utf-8")
    policy: dict[str, Any] = json.loads(text)
    return policy


def build_cache(policy: dict[str, Any] | None = None) -> Cache:
    """An empty cache for one ``generate``."""
    policy = policy or load()
    options = policy["options"]
    return Cache(layers=[PolicyLayer([options[name] for name in row]) for row in policy["heads"]])


def apply(model: Any, policy: dict[str, Any] | None = None) -> None:
    """Make the model's attention tell the cache what a prompt looked at.

    Raises:
        ValueError: the policy was made for another model's shape.
    """
    heads, config = (policy or load())["heads"], model.config.get_text_config()
    made_for, has = (
        (len(heads), len(heads[0])),
        (config.num_hidden_layers, config.num_key_value_heads),
    )
    if made_for != has:
        raise ValueError(f"the policy is for {made_for} layers and KV heads, the model has {has}")
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, AttentionMaskInterface()["sdpa"])
    model.set_attn_implementation(NAME)


def prompt_bytes(cache: Cache) -> int:
    """Bytes that the compressed prompt takes: codes, scales and a length a head."""
    return sum(layer.prompt_bytes() for layer in cache.layers)


def prompt_lengths(cache: Cache) -> list[list[int]]:
    """Prompt tokens kept, by layer and KV head."""
    return [layer.counts() for layer in cache.layers]


def attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention over a prompt, after which it is compressed, or over what is left of it."""
    layer = getattr(key, "policy_layer", None)
    if layer is not None and layer.stored:
        attention_mask = layer.visible(query.shape[-2], query.shape[1] // key.shape[1])
    elif layer is not None and attention_mask is not None:
        raise ValueError("the policy needs prompts without padding and layers without windows")
    sdpa = AttentionInterface()["sdpa"]
    output: tuple[Tensor, None] = sdpa(module, query, key, value, attention_mask, **kwargs)
    if layer is not None and not layer.stored:
        layer.compress(query, kwargs.get("scaling") or query.shape[-1] ** -0.5)
    return output


class PolicyLayer(CacheLayerMixin):  # type: ignore[misc]
    """One layer: its prompt as each head's option stores it, and the tokens since then."""

    is_sliding = False
    supports_early_init = False

    def __init__(self, options: list[dict[str, Any]]) -> None:
        """Take one option a KV head."""
        super().__init__()
        self.options = options
        self.reset()

    def reset(self) -> None:
        """Drop all tokens, as before the first prompt."""
        self.stored: list[tuple[Stored, Stored]] = []
        self.keys: Any = None
        self.values: Any = None
        self.is_initialized = False
        self.seen = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Start with no token."""
        self.keys, self.values = key_states[..., :0, :], value_states[..., :0, :]
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Add tokens; give all that is left to attend to, ``[B, H, n, D]``, padded to one n."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        elif not self.stored:
            raise RuntimeError("the prompt was never compressed: call kv_cache.apply(model) first")
        self.keys = torch.cat([self.keys, key_states], -2)
        self.values = torch.cat([self.values, value_states], -2)
        self.seen += key_states.shape[-2]
        keys: Any = torch.cat([*self._prompt(0), self.keys], -2)
        keys.policy_layer = self  # how the attention function finds the layer
        return keys, torch.cat([*self._prompt(1), self.values], -2)

    def compress(self, query: Tensor, scale: float) -> None:
        """Choose and store each head's tokens; ``query`` ``[B, Hq, P, D]`` is the prompt's."""
        grouped = query.reshape(len(query), len(self.options), -1, *query.shape[2:])
        for head, option in enumerate(self.options):
            key, value = self.keys[:, head], self.values[:, head]
            at = choose(option, grouped[:, head], key, scale)[..., None].expand(
                -1, -1, key.shape[-1]
            )
            by_channel = option["keys"].get("keys_by") != "token"
            keys = Stored(key.gather(1, at), option["keys"], along_tokens=by_channel)
            self.stored.append((keys, Stored(value.gather(1, at), option["values"])))
        self.keys, self.values = (x[..., :0, :].clone() for x in (self.keys, self.values))

    def counts(self) -> list[int]:
        """Prompt tokens that each head keeps."""
        return [keys.tokens for keys, _ in self.stored]

    def prompt_bytes(self) -> int:
        """Bytes of the stored prompt."""
        return sum(4 + keys.bytes() + values.bytes() for keys, values in self.stored)

    def _prompt(self, which: int) -> list[Tensor]:
        """The stored prompt read back, ``[B, H, n, D]``: nothing, or one padded tensor."""
        longest = max(self.counts(), default=0)
        rows = [pair[which].read() for pair in self.stored]
        return (
            [torch.stack([F.pad(x, (0, 0, 0, longest - x.shape[1])) for x in rows], 1)]
            if rows
            else []
        )

    def visible(self, queries: int, group: int) -> Tensor | None:
        """What the newest tokens may look at, ``[1, Hq, Q, n]``; None for everything."""
        counts, device = self.counts(), self.keys.device
        if queries == 1 and len(set(counts)) == 1:
            return None
        since = self.keys.shape[-2]
        prompt = (
            torch.arange(max(counts), device=device) < torch.tensor(counts, device=device)[:, None]
        )
        recent = torch.ones(queries, since, dtype=torch.bool, device=device).tril(since - queries)
        parts = prompt[:, None].expand(-1, queries, -1), recent.expand(len(counts), -1, -1)
        return torch.cat(parts, -1).repeat_interleave(group, 0)[None]

    def get_seq_length(self) -> int:
        """Tokens seen, which is the next token's position."""
        return self.seen

    def get_mask_sizes(self, query_length: int | Tensor) -> tuple[int, int]:
        """Of the mask that transformers makes; ours replaces it after the prompt."""
        if isinstance(query_length, Tensor):  # the first releases of transformers 5 give positions
            query_length = len(query_length)
        return self.seen + query_length, 0

    def get_max_length(self) -> int:
        """Return -1: the cache grows without a limit."""
        return -1

    get_max_cache_shape = get_max_length  # its name in the first releases of transformers 5

    def crop(self, tokens_to_remove: int) -> None:
        """Not possible: what was evicted is gone."""
        raise NotImplementedError("a compressed prompt cannot be cropped")

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Not possible here."""
        raise NotImplementedError("no beam search with a compressed prompt")


# Which tokens stay


def choose(option: dict[str, Any], query: Tensor, key: Tensor, scale: float) -> Tensor:
    """Tokens of one head, ``[B, n]`` ascending; query ``[B, G, P, D]``, key ``[B, P, D]``."""
    method, tokens = option["method"], key.shape[1]
    budget = resolve(option["budget"], tokens)
    first, last, scores = SCORES[method["name"]](method, budget, query, key, scale)
    first = min(first, budget)
    last = min(last, budget - first)
    ranked = scores.clone()
    ranked[:, :first] = ranked[:, tokens - last :] = float("inf")
    newest_first = ranked.flip(-1).argsort(dim=-1, descending=True, stable=True)[:, :budget]
    return (tokens - 1 - newest_first).sort(-1).values


def resolve(budget: float | list[float] | None, tokens: int) -> int:
    """Tokens of a budget: a whole number, a share of the prompt (a float), or None for all.

    A list is a share and the tokens that it keeps at least.
    """
    if budget is None:
        return tokens
    if isinstance(budget, int):
        return min(budget, tokens)
    share, floor = budget if isinstance(budget, list) else (budget, 1)
    return int(min(max(round(share * tokens), floor, 1), tokens))


Scored = tuple[int, int, Tensor]  # tokens protected at the start and at the end, scores [B, P]


def rows(query: Tensor, key: Tensor, scale: float, end: int, count: int) -> Tensor:
    """``count`` rows of the causal attention matrix up to row ``end``, ``[B, G, count, P]``."""
    logits = query[:, :, end - count : end].float() @ key.float().transpose(-1, -2)[:, None] * scale
    row = torch.arange(end - count, end, device=key.device)
    column = torch.arange(key.shape[1], device=key.device)
    weights: Tensor = logits.masked_fill(column > row[:, None], -torch.inf).softmax(-1)
    return weights


def recency(key: Tensor) -> Tensor:
    """Newer tokens score higher."""
    return torch.arange(key.shape[1], device=key.device).float().expand(key.shape[0], -1)


def full(method: dict[str, Any], budget: int, query: Tensor, key: Tensor, scale: float) -> Scored:
    """The newest tokens."""
    return 0, 0, recency(key)


def streaming_llm(
    method: dict[str, Any], budget: int, query: Tensor, key: Tensor, scale: float
) -> Scored:
    """The first tokens and the newest."""
    return method["sinks"], 0, recency(key)


def h2o(method: dict[str, Any], budget: int, query: Tensor, key: Tensor, scale: float) -> Scored:
    """What drew most attention over the whole prompt, and the newest tokens."""
    sums = torch.zeros(query.shape[:3], device=key.device)
    for end in range(key.shape[1], 0, -256):
        sums += rows(query, key, scale, end, min(256, end)).sum(-2)
    return 0, int(budget * method["recent_share"]), sums.mean(1)


def snapkv(method: dict[str, Any], budget: int, query: Tensor, key: Tensor, scale: float) -> Scored:
    """What the last queries look at, with its neighbours."""
    window, kernel = min(method["window"], key.shape[1]), method["kernel"]
    recent = method["window"] if method["recent"] is None else method["recent"]
    scores = rows(query, key, scale, key.shape[1], window).mean(-2)
    if method["group"] == "averaged":
        scores = scores.mean(1, keepdim=True)
    if (prefix := key.shape[1] - recent) > 0:
        pool = F.max_pool1d if method["pooling"] == "max" else F.avg_pool1d
        smooth = pool(scores[..., :prefix], kernel, stride=1, padding=kernel // 2)
        scores = torch.cat((smooth, scores[..., prefix:]), -1)
    return 0, recent, scores.mean(1)


SCORES = {"full": full, "streaming_llm": streaming_llm, "h2o": h2o, "snapkv": snapkv}

# How they are stored


class Stored:
    """One head's keys or values, ``[B, n, D]``, as codes and scales."""

    def __init__(self, tensor: Tensor, form: dict[str, Any], along_tokens: bool = False) -> None:
        """Encode; groups are of one token's channels, or ``along_tokens`` of one channel."""
        self.tokens, self.dtype = tensor.shape[1], tensor.dtype
        self.bits, self.group = form.get("bits", 16), form.get("group", 1)
        self.along_tokens = along_tokens
        exact = self.tokens if form["name"] == "bf16" else form.get("exact_first", 0)
        self.exact, coded = tensor[:, :exact].clone(), tensor[:, exact:]
        self.scales: list[Tensor] = []
        self.codes: Tensor | None = None
        if coded.shape[1]:
            self._encode_fp8(coded) if form["name"] == "fp8" else self._encode_groups(coded)

    def _encode_fp8(self, coded: Tensor) -> None:
        largest = coded.abs().amax((-1, -2), keepdim=True).float()
        scale = largest.clamp_min(torch.finfo(torch.float32).tiny) / 448
        self.scales = [scale]
        self.codes = (coded.float() / scale).clamp(-448, 448).to(torch.float8_e4m3fn)

    def _encode_groups(self, coded: Tensor) -> None:
        lines = coded.float().transpose(1, 2) if self.along_tokens else coded.float()
        self.length = lines.shape[-1]
        padding = (0, -self.length % self.group)
        padded = [F.pad(x, padding, value=-torch.inf) for x in (lines, -lines)]
        high, low = (x.reshape(*x.shape[:-1], -1, self.group).amax(-1) for x in padded)
        low = (-low).half()
        scale = ((high - low.float()) / (2**self.bits - 1)).half()
        self.scales = [low, scale]
        step = torch.where(scale > 0, scale, 1).float()
        codes = ((lines - self._spread(low.float())) / self._spread(step)).round()
        self.codes = pack(codes.clamp(0, 2**self.bits - 1).to(torch.uint8), self.bits)

    def _spread(self, scales: Tensor) -> Tensor:
        return scales.repeat_interleave(self.group, -1)[..., : self.length]

    def read(self) -> Tensor:
        """``[B, n, D]`` in the model's dtype."""
        if self.codes is None:
            return self.exact
        if self.codes.dtype == torch.float8_e4m3fn:
            return (self.codes.float() * self.scales[0]).to(self.dtype)
        low, scale = (self._spread(x.float()) for x in self.scales)
        lines = unpack(self.codes, self.bits, self.length).float() * scale + low
        coded = lines.transpose(1, 2) if self.along_tokens else lines
        return torch.cat([self.exact, coded.to(self.dtype)], 1)

    def bytes(self) -> int:
        """Bytes held; 16-bit parts count two bytes an element whatever the model's dtype."""
        codes = 0 if self.codes is None else self.codes.numel()
        scales = sum(x.numel() * x.element_size() for x in self.scales)
        return 2 * self.exact.numel() + codes + scales


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes ``[..., n]`` below 2^bits as bytes ``[..., ceil(n * bits / 8)]``."""
    unit = bits if 8 % bits == 0 else 1  # bits that are moved together
    fields = ((codes[..., None] >> _shifts(bits, unit, codes)) & (2**unit - 1)).flatten(-2)
    fields = F.pad(fields, (0, -fields.shape[-1] % (8 // unit)))
    fields = fields.reshape(*fields.shape[:-1], -1, 8 // unit)
    return (fields << _shifts(8, unit, codes)).sum(-1, dtype=torch.uint8)


def unpack(packed: Tensor, bits: int, length: int) -> Tensor:
    """The ``length`` codes of each row."""
    unit = bits if 8 % bits == 0 else 1
    fields = ((packed[..., None] >> _shifts(8, unit, packed)) & (2**unit - 1)).flatten(-2)
    fields = fields[..., : length * bits // unit]
    fields = fields.reshape(*packed.shape[:-1], length, bits // unit)
    codes: Tensor = (fields << _shifts(bits, unit, packed)).sum(-1, dtype=torch.uint8)
    return codes


def _shifts(bits: int, unit: int, like: Tensor) -> Tensor:
    return torch.arange(0, bits, unit, device=like.device, dtype=torch.uint8)
