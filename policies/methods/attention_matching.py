"""Attention Matching: few keys with log-weights, and values fitted to the same attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from kvtune.policies.gathering import of_tokens
from kvtune.policies.method import Method, find_method
from kvtune.policies.parts import Part, PartPlan
from kvtune.policies.registry import parameter
from kvtune.policies.signals import Needs, Signals
from kvtune.policies.work import LayerShape, Work

if TYPE_CHECKING:
    from torch import Tensor

_REFERENCES = 512  # queries a query head
_STEPS_TOGETHER = 6
_NEEDS = {
    "prompt": Needs(later_queries=True),
    "repeat": Needs(repeat_queries=True),
    "self_study": Needs(study_queries=True),
}
_RECORDED: dict[str, Literal["repeat_queries", "study_queries"]] = {
    "repeat": "repeat_queries",
    "self_study": "study_queries",
}


@dataclass(frozen=True)
class AttentionMatching(Method):
    """The attention of reference queries to the whole prompt, matched with a few entries.

    a       = attention of the reference queries to the prompt: a sample of the prompt's own
              queries, turned to the positions behind it
    kept    = orthogonal matching pursuit of (output, mass) with the columns of a
    w       = non-negative least squares: a[:, kept] w = 1; log w is added to the logits
    v[kept] = least squares: softmax(logits + log w) v = a V

    Source: Zweiger et al., "Fast KV Compaction via Attention Matching", arXiv 2602.16284: keys of
    tokens, a log-weight a key from the mass, values from the output, all in closed form. Differs:
    pursuit looks at outputs and mass together (theirs at the mass alone); by default queries are
    the prompt's own, turned to where the queries to come will be (theirs, by ``queries``, come from
    a pass that repeats the prompt, or from self-study); the mass is matched in relative terms;
    weights and values are held to 1 and to the tokens' own by a small ridge; budgets are the
    policy's. ``select`` names a cheaper variant: the tokens that another method keeps, with fitted
    weights and values. ``fit="together"``, ours, goes on from there: damped Gauss-Newton steps of
    the log-weights on outputs and mass, values solved after each.
    Cost: O(Hq R P (D + budget)) once a prompt; a log-weight an entry.
    """

    name = "attention_matching"
    source = "Zweiger et al., arXiv 2602.16284"
    stores_whole_prompts_alike = False  # part of one has log-weights beside it

    select: Literal["pursuit", "expected_attention", "h2o", "kvzip", "snapkv"] = parameter(
        "pursuit", "what chooses tokens: matching pursuit, or a method that scores them"
    )
    queries: Literal["prompt", "repeat", "self_study"] = parameter(
        "prompt", "reference queries: the prompt's own, those of a pass that repeats it, or the "
        "model's while it answers requests about it",
    )  # fmt: skip
    pursued: int = parameter(
        128, "most tokens that pursuit chooses; those of most attention follow",
        unit="tokens", low=1, high=4096,
    )  # fmt: skip

    fit: Literal["apart", "together"] = parameter(
        "apart", "weights by the mass and then values, or steps that fit both to outputs and mass"
    )

    @property
    def needs(self) -> Needs:
        """Reference queries, and what choosing takes."""
        needs = _NEEDS[self.queries]
        return needs if self._by is None else needs | self._by.needs

    @property
    def _by(self) -> Method | None:
        return None if self.select == "pursuit" else find_method(self.select)()

    def keep(self, signals: Signals, budget: int) -> Tensor:
        """The tokens that pursuit, or the named method, chooses."""
        if self._by is not None or budget >= signals.prompt_tokens:
            return (self._by or find_method("full")()).keep(signals, budget)
        ranked = self._ranked(signals, budget)
        return ranked[:, :budget].sort(-1).values

    def parts(self, signals: Signals, budget: int) -> list[Part]:
        """The chosen tokens' keys with fitted weights and values; all as they are if all fit."""
        from kvtune.policies.fitting import fitted_together, fitted_values, mass_weights

        kept = self.keep(signals, budget)
        if not 0 < budget < signals.prompt_tokens:
            return [Part(kept)]
        keys, own = of_tokens(signals.keys, kept), of_tokens(signals.values, kept)
        outputs, columns = self._outputs(signals), self._columns(signals, keys)
        if self.fit == "together":
            weights, values = fitted_together(columns, outputs, own)
        else:
            weights = mass_weights(columns)
            values = fitted_values(columns, weights, outputs, own)
        return [Part(kept, keys, values.to(own.dtype), weights.log().float())]

    def plan(self, budget: int, prompt_tokens: int) -> tuple[PartPlan, ...]:
        """A log-weight beside every entry, unless all tokens stay as they are."""
        is_fitted = 0 < budget < prompt_tokens
        return (PartPlan(min(budget, prompt_tokens), weighted=is_fitted),)

    def _references(self, signals: Signals) -> Tensor:
        """Reference queries in units of the logits, ``[H, R, D]`` float32."""
        if self.queries == "prompt":
            queries = signals.later_queries()
        else:
            queries = signals.reference_queries(_RECORDED[self.queries])
        return queries.flatten(1, 2) * signals.scale

    def _whole(self, signals: Signals) -> tuple[Tensor, Tensor]:
        """What reference queries read of the whole prompt, ``[H, R, D]``, and their log-sum-exp,
        ``[H, R]``; no attention is written."""
        from kvtune.policies.attention import attend

        def compute() -> tuple[Tensor, Tensor]:
            queries = self._references(signals)[:, None]
            keys, values = signals.keys.float()[:, None], signals.values.float()[:, None]
            output, log_sum = attend(queries, keys, values, None, 1.0)
            return output[:, 0], log_sum[:, 0]

        return signals.once(f"outputs of {self.queries} queries", compute)

    def _outputs(self, signals: Signals) -> Tensor:
        return self._whole(signals)[0]

    def _columns(self, signals: Signals, keys: Tensor) -> Tensor:
        """What reference queries pay to these tokens of the prompt, ``[H, R, n]`` float64."""
        logits = self._references(signals) @ keys.float().mT
        return (logits - self._whole(signals)[1][..., None]).exp().double()

    def _attention(self, signals: Signals) -> Tensor:
        """What reference queries pay to the prompt, ``[H, R, P]`` float32."""

        def compute() -> Tensor:
            logits = self._references(signals) @ signals.keys.float().mT
            return logits.softmax(-1)

        return signals.once(f"attention of {self.queries} queries", compute)

    def _ranked(self, signals: Signals, budget: int) -> Tensor:
        """Tokens in the order of pursuit, then of attention, ``[H, at least budget]``.

        Pursuit for a larger budget begins with that for a smaller one: a few lengths serve all.
        """
        import torch

        from kvtune.policies.fitting import pursued

        tokens = signals.prompt_tokens
        count = min(1 << max(budget - 1, 1).bit_length(), self.pursued, tokens)
        attention = self._attention(signals)

        def compute() -> Tensor:
            first = pursued(attention, signals.values.float(), count)
            mass = attention.sum(1).scatter(1, first, -torch.inf)
            rest = mass.argsort(dim=-1, descending=True, stable=True)[:, : tokens - count]
            return torch.cat([first, rest], -1)

        return signals.once(f"pursued {count} by {self.queries} queries", compute)

    def work(self, shape: LayerShape, budget: int) -> Work:
        """Attention of the references, pursuit, and two small systems."""
        size = min(budget, shape.prompt_tokens)
        rows = float(shape.query_heads * min(_REFERENCES, shape.prompt_tokens))
        logits = 2 * rows * shape.prompt_tokens * shape.head_dim
        steps = min(size, self.pursued) if self.select == "pursuit" else 0
        pursuit = 2 * rows * shape.prompt_tokens * steps
        rounds = 1 if self.fit == "apart" else 1 + _STEPS_TOGETHER
        systems = rounds * (4 * rows * size**2 + 2 * shape.kv_heads * float(size) ** 3)
        moved = 4 * rows * shape.prompt_tokens * (2 + steps)
        # One pursued token after another.
        launches = 390 + 45.0 * steps + 90 * (rounds - 1)
        more = Work(2 * logits + pursuit + systems, moved, launches=launches)
        return super().work(shape, budget) + more
