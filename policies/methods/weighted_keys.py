"""Keys weighted by the queries: what a format loses of a channel counts as much as it is read."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from kvtune.policies.method import Method, find_method
from kvtune.policies.parts import Part, PartPlan
from kvtune.policies.registry import parameter
from kvtune.policies.signals import Needs, Signals
from kvtune.policies.work import LayerShape, Work

if TYPE_CHECKING:
    from torch import Tensor

_RECENT = 64
_SMALLEST = 1e-3  # of a channel's weight, of the head's largest


@dataclass(frozen=True)
class WeightedKeys(Method):
    """A rule around a method: the keys that it keeps are stored in units of what reads them.

    weight[c] = root mean square of channel c of the queries to come, over the head's group
    stored    = k[c] * weight[c], divided by it again where it is read

    An error e of a key costs (q . e) in a logit, in the mean of squares sum_c weight[c]^2 e[c]^2.
    Scaled keys make that the plain squared error, which formats that divide bits among channels
    (``allocated``, ``fitted``) then lower where it counts. The queries are the prompt's own, turned
    to positions behind it. Keeps what ``by`` keeps.

    Source: ours. That rotations and scales of keys ought to follow the queries' second moments is
    in "OSCAR", arXiv 2605.17757, which measures them on other text beforehand.
    Cost: O(Hq n D) once a prompt, and that of the method; 16 bits a channel.
    """

    name = "weighted_keys"
    source = "ours, after arXiv 2605.17757"

    by: Literal[
        "full", "a2sf", "expected_attention", "h2o", "kvzip", "scissorhands", "snapkv",
        "streaming_llm",
    ] = parameter("full", "the method that chooses what stays")  # fmt: skip

    queries: Literal["later", "recent"] = parameter(
        "later", "whose squares are taken: a sample of all, turned to positions behind the prompt, "
        "or the last 64 as they are, which a serving engine shows",
    )  # fmt: skip

    @property
    def _method(self) -> Method:
        return find_method(self.by)()

    @property
    def needs(self) -> Needs:
        """What the method inside reads, and queries."""
        ours = Needs(window=_RECENT) if self.queries == "recent" else Needs(later_queries=True)
        return self._method.needs | ours

    @property
    def looks_across_heads(self) -> bool:
        """Whether the method inside looks across heads."""
        return self._method.looks_across_heads

    def keep(self, signals: Signals, budget: int) -> Tensor:
        """What the method inside keeps."""
        return self._method.keep(signals, budget)

    def parts(self, signals: Signals, budget: int) -> list[Part]:
        """The parts of the method inside, their keys weighted."""
        name = f"weights of keys by {self.queries} queries"
        weights = signals.once(name, lambda: _weights(self._queries(signals)))
        return [replace(part, balance=weights) for part in self._method.parts(signals, budget)]

    def _queries(self, signals: Signals) -> Tensor:
        """Of each KV head, ``[H, G, n, D]`` float32."""
        if self.queries == "later":
            return signals.later_queries()
        recent = signals.queries[:, -_RECENT:].float()
        grouped: Tensor = recent.unflatten(0, (len(signals.keys), -1))
        return grouped

    def plan(self, budget: int, prompt_tokens: int) -> tuple[PartPlan, ...]:
        """The plan of the method inside, with a weight a channel."""
        return tuple(
            replace(part, balanced=True) for part in self._method.plan(budget, prompt_tokens)
        )

    def work(self, shape: LayerShape, budget: int) -> Work:
        """The work of the method inside, and a mean of squares."""
        read = 4.0 * shape.query_heads * min(512, shape.prompt_tokens) * shape.head_dim
        return self._method.work(shape, budget) + Work(read / 2, read, launches=6)


def _weights(queries: Tensor) -> Tensor:
    """``[H, D]``, rounded as they are stored; the head's largest is 1."""
    size = queries.square().mean((1, 2)).sqrt()
    most = size.amax(-1, keepdim=True).clamp_min(1e-30)
    weights: Tensor = (size / most).clamp_min(_SMALLEST).bfloat16().float()
    return weights
