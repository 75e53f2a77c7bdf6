"""Protected spans: instructions that no method may drop or store in fewer bits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, cast

from kvtune.policies.formats.bf16 import Bf16
from kvtune.policies.method import Method, ScoredMethod, find_method
from kvtune.policies.parts import Part, PartPlan
from kvtune.policies.registry import LONGEST_PROMPT, parameter
from kvtune.policies.signals import Needs, Signals
from kvtune.policies.work import LayerShape, Work

if TYPE_CHECKING:
    from torch import Tensor

_EXACT = (Bf16(), Bf16())


@dataclass(frozen=True)
class Protected(Method):
    """A rule around any method that only ranks tokens: those of a span stay whatever their rank.

    span = tokens ``start`` to ``stop`` of the prompt, stored in 16 bits, as far as the budget goes
    rest = of all other tokens those that ``by`` ranks highest, as many as the budget has left

    Source: the rule is ours; its reason is "The Pitfalls of KV Cache Compression", arXiv
    2510.00231: under eviction, instructions are lost and system prompts leak. The method keeps its
    published parameters, and the tokens that it protects itself; the span comes before those. What
    stores other than a prompt's own keys and values (merged, fitted, shared by layers) or reads
    less than it holds cannot be wrapped.
    Cost: that of the method.
    """

    name = "protected"
    source = "a rule after arXiv 2510.00231"

    by: Literal[
        "a2sf", "cake", "compresskv", "expected_attention", "full", "h2o", "keydiff", "keyformer",
        "knorm", "kvzip", "lazy_eviction", "mustdrop", "random", "scissorhands", "snapkv",
        "streaming_llm", "tova", "triattention",
    ] = parameter("snapkv", "the method that chooses among all other tokens")  # fmt: skip
    start: int = parameter(0, "first token of the span", unit="tokens", low=0, high=LONGEST_PROMPT)
    stop: int = parameter(64, "token behind the span", unit="tokens", low=0, high=LONGEST_PROMPT)

    @property
    def needs(self) -> Needs:
        """The signals that the method inside reads."""
        return self._method.needs

    @property
    def _method(self) -> ScoredMethod:
        return cast("ScoredMethod", find_method(self.by)())

    @property
    def looks_across_heads(self) -> bool:
        """Whether the method inside looks across heads."""
        return self._method.looks_across_heads

    @property
    def heads_are_alike(self) -> bool:  # type: ignore[override]
        """Whether the method inside treats heads alike."""
        return self._method.heads_are_alike

    def keep(self, signals: Signals, budget: int) -> Tensor:
        """The span, and of all other tokens those that the method ranks highest."""
        import torch

        return torch.cat(self._span_and_rest(signals, budget), -1).sort(-1).values

    def parts(self, signals: Signals, budget: int) -> list[Part]:
        """The span in 16 bits, and what else is kept in the option's formats."""
        span, rest = self._span_and_rest(signals, budget)
        if not span.shape[1]:
            return [Part(rest)]
        inside = Part(span, formats=_EXACT)
        return [inside, Part(rest)] if rest.shape[1] else [inside]

    def plan(self, budget: int, prompt_tokens: int) -> tuple[PartPlan, ...]:
        """The span in 16 bits, and the rest of the budget."""
        first, stop = self._bounds(budget, prompt_tokens)
        rest = min(budget, prompt_tokens) - (stop - first)
        if stop == first:
            return (PartPlan(rest),)
        inside = PartPlan(stop - first, _EXACT)
        return (inside, PartPlan(rest)) if rest else (inside,)

    def _bounds(self, budget: int, prompt_tokens: int) -> tuple[int, int]:
        """The span within the prompt and the budget."""
        first = min(self.start, prompt_tokens)
        return first, min(max(self.stop, first), prompt_tokens, first + budget)

    def _span_and_rest(self, signals: Signals, budget: int) -> tuple[Tensor, Tensor]:
        """Token indices of both, ``[H, n]`` each, ascending."""
        import torch

        heads, tokens, _ = signals.keys.shape
        first, stop = self._bounds(budget, tokens)
        span = torch.arange(first, stop, device=signals.keys.device).expand(heads, -1)
        count = min(budget, tokens) - (stop - first)
        ranked = self._method.ranked(signals, count) if count else signals.keys[..., 0].float()
        newest_first = ranked.clone()
        newest_first[:, first:stop] = -torch.inf
        best = newest_first.flip(-1).argsort(dim=-1, descending=True, stable=True)[:, :count]
        return span, (tokens - 1 - best).sort(-1).values

    def work(self, shape: LayerShape, budget: int) -> Work:
        """The work of the method inside."""
        return self._method.work(shape, budget)
