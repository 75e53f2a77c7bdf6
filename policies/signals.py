"""What a method may look at when the prompt of one layer is complete.

Replay fills it from a trace and the live cache from the running model; a method cannot tell
which, and that is what keeps the two alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from kvtune.common.errors import KvtuneError
from kvtune.common.rotary import Rope, later_queries, query_moments

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")

ALL_QUERIES = 2**31 - 1
"""A window that spans every prompt."""


@dataclass(frozen=True)
class Needs:
    """What a method must be given, as plain data that capture can be told.

    Args:
        window: how many of the last prompt queries it looks at; 0 for none.
        column_sums: whether it needs the attention that every key drew over the whole prompt.
        query_moments: mean and covariance of the prompt's queries before RoPE.
        later_queries: a sample of the prompt's queries, turned to positions behind the prompt.
        reconstruction: the attention that a pass repeating the prompt pays to it.
        repeat_queries: a sample of that pass's queries.
        study_queries: queries of the model while it answers requests about the prompt.
        learned: matrices fitted to the model once.
        calibration: what was measured on the model once, before any prompt.
        future: the observed tokens themselves; only references that look ahead.
        probes: how the loss responds to the observed tokens' attention output; likewise.
        linked: the keys and values of another layer, which ``Method.linked_layer`` names.
        sentences: which tokens end a sentence.
        rope: the model's rotary positions, which a serving engine does not show.
    """

    window: int = 0
    column_sums: bool = False
    query_moments: bool = False
    reconstruction: bool = False
    calibration: bool = False
    future: bool = False
    probes: bool = False
    linked: bool = False
    later_queries: bool = False
    sentences: bool = False
    repeat_queries: bool = False
    study_queries: bool = False
    learned: bool = False
    rope: bool = False

    @property
    def asks_model(self) -> bool:
        """Whether the model runs more passes when it has read the prompt."""
        return self.reconstruction or self.repeat_queries or self.study_queries

    @property
    def by_head(self) -> bool:
        """Whether all of it is each head's own, so that prompts can lie side by side."""
        whole = (self.calibration, self.future, self.probes, self.linked, self.sentences)
        return not any(whole)

    def queries(self, prompt_tokens: int) -> int:
        """How many of the last prompt queries hold all that is asked of them."""
        every = self.column_sums or self.query_moments or self.later_queries
        return prompt_tokens if every else min(self.window, prompt_tokens)

    def __or__(self, other: Needs) -> Needs:
        """What two methods need together."""
        pairs = ((getattr(self, f.name), getattr(other, f.name)) for f in fields(self))
        return Needs(*(max(pair) for pair in pairs))


@dataclass(frozen=True)
class Future:
    """What comes after the prompt in the full-cache run.

    Args:
        queries: of the observed tokens, ``[Hq, C, D]``.
        keys: likewise ``[H, C, D]``.
        values: likewise ``[H, C, D]``.
        probes: gradients of drawn labels' log-likelihood at the attention output,
            ``[S, C, Hq, D]``.
    """

    queries: Tensor
    keys: Tensor
    values: Tensor
    probes: Tensor | None = None


@dataclass
class Signals:
    """One layer of one prompt; or of several side by side, for methods that look at no other head.

    Args:
        queries: the last prompt queries, after RoPE, ``[Hq, W, D]`` (all of them or a tail).
        keys: ``[H, P, D]`` after RoPE.
        values: ``[H, P, D]``.
        scale: what ``q @ k`` is multiplied with before the softmax.
        recorded_column_sums: ``[Hq, P]`` float32, each key's attention summed over all prompt
            queries, where capture recorded it.
        layer: which layer this is.
        rope: its rotary positions; None for a model without.
        recorded_query_moments: mean ``[Hq, D]`` and covariance ``[Hq, D, D]`` float32 of the
            queries before RoPE, where the driver kept no more of them.
        recorded_later_queries: ``[Hq, n, D]`` float32, a sample of the prompt's queries turned to
            positions behind it, likewise.
        reconstruction: ``[H, P]`` float32, the most attention that any query of a pass repeating
            the prompt pays to each key.
        repeat_queries: ``[Hq, n, D]`` float32, a sample of that pass's queries.
        study_queries: ``[Hq, n, D]`` float32, queries of the model while it answers requests about
            the prompt.
        learned: matrices of this layer that were fitted to the model once, by name.
        head_scores: ``[Hq]`` float32, how much each query head looks at what it is about to copy,
            measured on the model once.
        layer_error: relative error of this layer's output under a tiny cache, likewise.
        future: the observed tokens, for references that look ahead.
        linked: keys and values ``[H, P, D]`` of the layer that a method links to this one.
        sentence_ends: whether each token of the prompt, and of what is observed after it, ends a
            sentence, ``[N]`` bool.
    """

    queries: Tensor
    keys: Tensor
    values: Tensor
    scale: float
    recorded_column_sums: Tensor | None = None
    layer: int = 0
    rope: Rope | None = None
    recorded_query_moments: tuple[Tensor, Tensor] | None = None
    recorded_later_queries: Tensor | None = None
    reconstruction: Tensor | None = None
    head_scores: Tensor | None = None
    layer_error: float | None = None
    future: Future | None = None
    linked: tuple[Tensor, Tensor] | None = None
    sentence_ends: Tensor | None = None
    repeat_queries: Tensor | None = None
    study_queries: Tensor | None = None
    learned: Mapping[str, Tensor] = field(default_factory=dict)
    _memo: dict[str, Any] = field(default_factory=dict, repr=False)

    @property
    def prompt_tokens(self) -> int:
        """P, the number of tokens that a choice is made among."""
        return self.keys.shape[-2]

    def once(self, name: str, compute: Callable[[], T]) -> T:
        """Compute a derived signal at the first asking and keep it."""
        if name not in self._memo:
            self._memo[name] = compute()
        found: T = self._memo[name]
        return found

    def given(self, name: str) -> Any:
        """A signal that only a driver can provide.

        Raises:
            KvtuneError: it was not recorded.
        """
        value = getattr(self, name)
        if value is None:
            raise self._missing(name)
        return value

    def window_attention(self, window: int) -> Tensor:
        """Attention of the last ``window`` prompt queries over all keys, ``[H, G, W, P]`` float32.

        A prompt shorter than the window gives as many rows as it has tokens.
        """
        window = min(window, self.prompt_tokens)
        return self.once(f"window {window}", lambda: self._attend(window))

    def column_sums(self) -> Tensor:
        """Attention that each key drew, summed over all prompt queries: ``[H, G, P]`` float32."""
        if self.recorded_column_sums is None:
            return self.once("columns", lambda: self._sum_columns())
        return self._by_kv_head(self.recorded_column_sums.float())

    def attention_tiles(self, tile: int = 256) -> Iterator[tuple[int, Tensor]]:
        """The whole attention matrix, ``tile`` rows at a time, so that it is never held at once.

        Yields:
            the position of the first row, and the rows ``[H, G, T, P]`` float32; last rows first.
        """
        for end in range(self.prompt_tokens, 0, -tile):
            rows = min(tile, end)
            yield end - rows, self._attend(rows, end)

    def query_moments(self) -> tuple[Tensor, Tensor]:
        """Mean ``[H, G, D]`` and covariance ``[H, G, D, D]`` of the queries before RoPE.

        The first few queries are left out, unless there are no others. The covariance is the
        biased one.
        """
        mean, covariance = self.recorded_query_moments or self.once("moments", self._moments)
        return self._by_kv_head(mean), self._by_kv_head(covariance)

    def later_queries(self) -> Tensor:
        """What queries to come may look like, ``[H, G, n, D]`` float32.

        A sample of the prompt's own, turned to positions right behind it.
        """
        if self.recorded_later_queries is None:
            if self.queries.shape[-2] < self.prompt_tokens:
                raise self._missing("later_queries")
            return self.once(
                "later", lambda: self._by_kv_head(later_queries(self.queries, self.rope))
            )
        return self._by_kv_head(self.recorded_later_queries.float())

    def reference_queries(self, name: Literal["repeat_queries", "study_queries"]) -> Tensor:
        """Queries of another pass over the prompt, ``[H, G, n, D]`` float32."""
        recorded: Tensor = self.given(name)
        return self._by_kv_head(recorded.float())

    def matrices(self, name: str) -> Tensor:
        """What was fitted to the model once, of this layer.

        Raises:
            KvtuneError: it was not.
        """
        found = self.learned.get(name)
        if found is None:
            raise KvtuneError(
                f"the model has no {name!r} yet",
                hint=f"python -m kvtune.runtime.learn MODEL {name.split('_')[0]} fits it once.",
            )
        return found

    def future_attention(self) -> Tensor:
        """Attention of the observed queries over prompt and observed keys, ``[H, G, C, P]``."""
        return self.once("future", self._look_ahead)

    def probes(self) -> Tensor:
        """Gradients at the observed tokens' attention output, ``[S, C, Hq, D]``.

        Raises:
            KvtuneError: they were not recorded.
        """
        future: Future = self.given("future")
        if future.probes is None:
            raise self._missing("probes")
        return future.probes

    def _missing(self, name: str) -> KvtuneError:
        return KvtuneError(
            f"the signal {name!r} of layer {self.layer} was not recorded",
            hint="capture the trace again with the signals that the policy needs.",
        )

    def _by_kv_head(self, tensor: Tensor) -> Tensor:
        split: Tensor = tensor.unflatten(0, (self.keys.shape[0], -1))
        return split

    def _attend(self, window: int, end: int | None = None) -> Tensor:
        """Rows ``end - window`` to ``end`` of the causal attention matrix, ``[H, G, W, P]``."""
        from kvtune.policies.prompt_attention import causal_attention

        end = self.prompt_tokens if end is None else end
        offset = self.queries.shape[-2] - self.prompt_tokens  # of row p in a recorded tail
        if offset + end - window < 0:
            raise ValueError(f"{window} queries are needed, {self.queries.shape[-2]} were recorded")
        rows = self._by_kv_head(self.queries[:, offset + end - window : offset + end])
        return causal_attention(rows, self.keys, self.scale, end - window)

    def _sum_columns(self) -> Tensor:
        import torch

        shape = *self._by_kv_head(self.queries).shape[:2], self.prompt_tokens
        sums = torch.zeros(shape, device=self.keys.device)
        for _, rows in self.attention_tiles():
            sums += rows.sum(-2)
        return sums

    def _moments(self) -> tuple[Tensor, Tensor]:
        if self.queries.shape[-2] < self.prompt_tokens:
            raise self._missing("query_moments")
        return query_moments(self.queries, self.rope)

    def _look_ahead(self) -> Tensor:
        import torch

        from kvtune.policies.prompt_attention import causal_attention

        future: Future = self.given("future")
        queries, prompt = self._by_kv_head(future.queries), self.prompt_tokens
        keys = torch.cat((self.keys, future.keys), 1)
        return causal_attention(queries, keys, self.scale, prompt)[..., :prompt]
