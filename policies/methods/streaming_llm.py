"""StreamingLLM: attention sinks and a sliding window."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from kvtune.common.rotary import turn
from kvtune.policies.decode import DecodeMethod, DecodeState
from kvtune.policies.registry import LONGEST_PROMPT, parameter
from kvtune.policies.signals import Needs, Signals

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class StreamingLLM(DecodeMethod):
    """Softmax dumps surplus mass on the first tokens: keep a few of them and the newest ones.

    keep = first ``sinks`` + last ``budget - sinks``; while decoding, the window rolls.

    ``positions``: ``kept`` leaves every key at the position it was computed at; ``reindexed``
    numbers positions inside the cache, as the authors do. They store keys before RoPE and turn all
    of them at each step. Attention depends on differences alone, and only the sinks' distance to
    the query differs between the two, so that turning the sinks by the number of evicted tokens
    gives the same logits.

    Source: Xiao et al., "Efficient Streaming Language Models with Attention Sinks", ICLR 2024,
    arXiv 2309.17453; 4 sinks as published. Differs from the authors' code: the prompt runs dense
    and is trimmed when complete. The default keeps positions, which is what serving stacks can do.
    Cost: none, or O(sinks D) a token and KV head when re-indexed. State: none.
    """

    name = "streaming_llm"
    source = "Xiao et al., ICLR 2024, arXiv 2309.17453"
    shape = "sinks+window"

    sinks: int = parameter(
        4, "first tokens that are always kept", unit="tokens", low=0, high=LONGEST_PROMPT
    )
    positions: Literal["kept", "reindexed"] = parameter(
        "kept", "where keys appear: at their own positions, or renumbered inside the cache"
    )

    @property
    def needs(self) -> Needs:
        """Positions, where keys are renumbered."""
        return Needs(rope=self.positions == "reindexed")

    @property
    def only_drops(self) -> bool:
        """Unless keys are renumbered."""
        return self.positions == "kept"

    @property
    def reads_step_number(self) -> bool:
        """Only where keys are renumbered at every step."""
        return self.positions == "reindexed"

    def protected(self, budget: int) -> tuple[int, int]:
        """The first tokens always stay."""
        return self.sinks, 0

    def statistics(self, signals: Signals) -> dict[str, Tensor]:
        """None: a token's place says all."""
        return {}

    def worth(self, state: DecodeState) -> Tensor:
        """A token is worth the more the newer it is."""
        return state.positions.float()

    def shift(self, state: DecodeState) -> Tensor | None:
        """The sinks move up to the window by as many positions as tokens have left between."""
        if self.positions == "kept":
            return None
        gap = state.now + 1 - state.live.sum(-1, keepdim=True)
        return gap * (state.positions < self.sinks)

    def merge(self, signals: Signals, kept: Tensor) -> tuple[Tensor, Tensor] | None:
        """The sinks' keys turned to where they appear, of a prompt that is trimmed once."""
        if self.positions == "kept" or signals.rope is None:
            return None
        gap = signals.prompt_tokens - kept.shape[-1]
        wide = kept[..., None].expand(*kept.shape, signals.keys.shape[-1])
        keys, values = signals.keys.gather(1, wide), signals.values.gather(1, wide)
        turned = turn(keys.float(), gap * (kept < self.sinks), signals.rope)
        return turned.to(keys.dtype), values
