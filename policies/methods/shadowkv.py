"""ShadowKV: chunks by their mean key; keys rebuilt from few dimensions; odd chunks kept exact."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvtune.common.rotary import turn
from kvtune.policies.gathering import of_tokens
from kvtune.policies.method import ReadingMethod
from kvtune.policies.parts import Part
from kvtune.policies.reader import Held
from kvtune.policies.recall import MiddleBlocks, between
from kvtune.policies.registry import parameter
from kvtune.policies.signals import Needs, Signals

if TYPE_CHECKING:
    from torch import Tensor

_OUTLIERS = 48 * 8 / 2048  # of the published budget, in tokens
_NUMBER_BYTES = 2


@dataclass(frozen=True)
class ShadowKV(ReadingMethod):
    """Holds every token; the budget is how many of them a step reads.

    rebuilt    = keys before RoPE, all heads of the layer side by side, projected to the ``rank``
                 directions that hold most of them, and turned again
    landmark   = mean key after RoPE of a chunk
    outliers   = 3/16 of the budget: chunks with the smallest cosine of any key with the landmark;
                 always read, and their keys are exact
    score[c]   = max over the head's group of softmax over chunks (q . landmark[c] * scale)
    read       = outliers, the last ``recent`` chunks with exact keys, and chunks of highest score

    Source: Sun et al., "ShadowKV: KV Cache in Shadows for High-Throughput Long-Context LLM
    Inference", ICML 2025, arXiv 2410.21465; rank 160, chunks of 8, 4 recent ones and 48 outliers of
    a budget of 2048 are the authors'. Differs: their budget does not count what is always read.
    The keys are held rebuilt but in full, so that held bytes are not yet smaller: the authors keep
    factors on the device and values on the host. Factors are not rounded to 16 bits.
    Cost: O(P (H D)^2) once a prompt; O(G D P / 8) a step; one key a chunk is held.
    """

    name = "shadowkv"
    source = "Sun et al., ICML 2025, arXiv 2410.21465"

    rank: int = parameter(160, "directions that keys are rebuilt from", low=1, high=65536)
    chunk: int = parameter(8, "tokens of a chunk", unit="tokens", low=1, high=4096)
    recent: int = parameter(4, "last chunks always read", low=0, high=4096)

    @property
    def needs(self) -> Needs:
        """Positions to turn keys back from."""
        return Needs(rope=True)

    @property
    def looks_across_heads(self) -> bool:
        """The directions are the layer's."""
        return True

    def reader(self, budget: int) -> Landmarks:
        """Chunks by their landmarks."""
        budget = max(budget, 1)
        last = min(max(self.recent * self.chunk, 1), max(budget // 4, 1))
        outliers = int(_OUTLIERS * budget) // self.chunk
        return Landmarks(self.chunk, budget, 0, last, outliers)

    def parts(self, signals: Signals, budget: int) -> list[Part]:
        """Every token; keys rebuilt but for outliers and the last chunks."""
        import torch

        tokens = self.keep(signals, budget)
        held = _everything(signals, tokens)
        reader = self.reader(budget)
        exact = ~between(held, reader.first, reader.last)
        outlying = reader.index(held)["outlying"].repeat_interleave(self.chunk, -1)
        exact = exact | outlying[:, : exact.shape[1]]
        keys = torch.where(exact[..., None], signals.keys, self.rebuilt(signals))
        return [Part(tokens, keys)]

    def rebuilt(self, signals: Signals) -> Tensor:
        """Keys ``[H, P, D]`` from the layer's few directions."""
        import torch

        keys, rope = signals.keys.double(), signals.rope
        at = torch.arange(keys.shape[1], device=keys.device)
        plain = keys if rope is None else turn(keys, -at, rope)
        wide = plain.transpose(0, 1).flatten(1)  # [P, H D]
        _, directions = torch.linalg.eigh(wide.T @ wide)
        few = directions[:, -self.rank :]
        back = (wide @ few @ few.T).unflatten(1, (len(keys), -1)).transpose(0, 1)
        turned: Tensor = back if rope is None else turn(back, at, rope)
        return turned.to(signals.keys.dtype)


def _everything(signals: Signals, tokens: Tensor) -> Held:
    """All of a prompt, as a reader is shown it."""
    import torch

    number = torch.arange(len(tokens), device=tokens.device)
    counts = torch.full_like(number, tokens.shape[1])
    keys, prompt = signals.keys.float(), signals.prompt_tokens
    return Held(keys, counts, tokens, number, torch.zeros_like(number), signals, prompt)


@dataclass(frozen=True)
class Landmarks(MiddleBlocks):
    """Ranks chunks by their mean key.

    Args:
        outliers: chunks that are always read.
    """

    outliers: int

    def score(self, held: Held, queries: Tensor, index: Mapping[str, Tensor]) -> Tensor:
        """The score of every chunk, ``[R, C, b]``; chunks that are outliers rank first."""
        import torch

        there = index["there"]
        logits = queries @ index["means"][:, None].transpose(-1, -2) * held.signals.scale
        logits = logits.masked_fill(~there[:, None, None], -torch.inf)
        soft = logits.softmax(-1).nan_to_num().amax(1)
        soft = soft.masked_fill(~there[:, None], -torch.inf)
        return soft.masked_fill(index["outlying"][:, None], torch.inf)

    def index(self, held: Held) -> dict[str, Tensor]:
        """``means`` of keys ``[R, b, D]``; of chunks ``[R, b]`` which are ``there``, and those of
        smallest cosine, ``outlying``."""
        import torch

        keys, real = self._exact(held)
        mean: Tensor = (keys * real[..., None]).sum(2) / real.sum(2).clamp_min(1)[..., None]
        there = real.any(-1)
        cosine = torch.cosine_similarity(keys, mean[:, :, None], dim=-1)
        least = cosine.masked_fill(~real, torch.inf).amin(-1).masked_fill(~there, torch.inf)
        found = least.topk(min(self.outliers, least.shape[-1]), -1, largest=False)
        flags = torch.zeros_like(least, dtype=torch.bool)
        flags.scatter_(-1, found.indices, found.values < torch.inf)
        return {"means": mean, "there": there, "outlying": flags}

    def _exact(self, held: Held) -> tuple[Tensor, Tensor]:
        """The prompt's own keys in chunks, ``[R, b, chunk, D]``, and which are real."""
        whole = held.signals.keys[held.heads].float()
        middle = between(held, self.first, self.last)
        keys = of_tokens(whole, held.tokens).masked_fill(~middle[..., None], 0)
        return self.in_blocks(keys, 0.0), self.in_blocks(middle, False)

    def index_bytes(self, entries: int, head_dim: int) -> int:
        """One key in 16 bits a chunk."""
        return -(-max(entries - self.last, 0) // self.block) * head_dim * _NUMBER_BYTES
