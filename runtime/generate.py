"""Generating tokens while the cache evicts, on the real model, held against the full cache.

The full cache, the batch's first row, chooses the tokens; every policy reads those same tokens
from a cache of its own. Each layer's entries live in slots, grouped by method, and a method that
evicts while decoding does so after each token, in each layer, with what that layer has become
under the policy: errors feed on each other, as they would in service. Float32 inside.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvtune.common.errors import KvtuneError
from kvtune.policies.noise import gumbel
from kvtune.policies.option import Option
from kvtune.policies.policy import Policy, footprint_of_lengths
from kvtune.policies.signals import Needs
from kvtune.policies.slots import SlotCache
from kvtune.runtime.live_policies import Group, LivePolicy, check, groups
from kvtune.runtime.prompts import Prompt, fresh_prompt, refuse_window
from kvtune.traces.models import LoadedModel
from kvtune.traces.samples import Sample
from kvtune.traces.seam import attending


@dataclass(frozen=True)
class GenerationRun:
    """One policy over the tokens that the full cache generated.

    Args:
        name: the policy's.
        kl: divergence from the full cache at every step, ``[T]`` nats.
        nll: negative log-likelihood of the next generated token, ``[T]`` nats.
        full_nll: the same under the full cache.
        agrees: whether the likeliest next token is the full cache's, ``[T]``.
        evicted: entries that left while decoding, ``[L, H]``: proof that the policy fired.
        trimmed: prompt tokens that left when the prompt was complete, ``[L, H]``.
        peak_entries: most entries at once, the newest included, ``[L, H]``.
        mean_bytes: of the cache, its statistics and lengths, mean over steps.
        peak_bytes: likewise with every head at its peak.
        statistics_bytes: the part of the mean that is the method's statistics.
    """

    name: str
    kl: NDArray[np.float32]
    nll: NDArray[np.float32]
    full_nll: NDArray[np.float32]
    agrees: NDArray[np.bool_]
    evicted: NDArray[np.int64]
    trimmed: NDArray[np.int64]
    peak_entries: NDArray[np.int64]
    mean_bytes: float
    peak_bytes: float
    statistics_bytes: float


class _Measured:
    """What is kept of every step, in room taken once.

    Small tensors that stay, allocated step by step between the logits that go, would leave the
    heap in pieces that no logits fit into again: it grew by a step's logits with every step.
    """

    def __init__(self, rows: int, room: int, first: int, device: str) -> None:
        self.tokens = torch.zeros(room + 1, dtype=torch.int64, device=device)
        self.tokens[0] = first
        self._kl, self._nll = (torch.zeros(rows, room, device=device) for _ in range(2))
        self._agrees = torch.zeros(rows, room, dtype=torch.bool, device=device)

    def put(self, step: int, logits: Tensor, chosen: Tensor) -> None:
        """KL from the first row ``[B]``, the chosen token's NLL, and whether the likeliest agree.

        Args:
            step: from 0.
            logits: ``[B, vocabulary]``.
            chosen: the token that the first row chose.
        """
        ours = logits.log_softmax(-1)
        likeliest = logits.argmax(-1)
        self.tokens[step + 1] = chosen
        self._kl[:, step] = (ours[0].exp() * (ours[0] - ours)).sum(-1)
        self._nll[:, step] = -ours[:, chosen]
        self._agrees[:, step] = likeliest == likeliest[0]

    def first(self, steps: int) -> tuple[NDArray[Any], ...]:
        """KL, NLL and agreement of the first so many steps, ``[B, steps]`` each."""
        whole = self._kl, self._nll, self._agrees
        return tuple(each[:, :steps].cpu().numpy() for each in whole)


class Generation:
    """A generation that can be advanced in stretches, and asked for its results in between.

    Life: build it (the prompt runs), ``advance`` as often as wanted, ``results``.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        prompt_ids: Sequence[int],
        policies: Sequence[LivePolicy],
        *,
        room: int,
        temperature: float = 0.0,
        seed: int = 0,
        banned: Sequence[int] = (),
    ) -> None:
        """Run the prompt and fill every cache.

        Args:
            loaded: the model.
            prompt_ids: the prompt, two tokens or more; its last token is the first to be read from
                the caches.
            policies: policies of this model's shape, whose formats store each token apart.
            room: tokens that will be generated at most.
            temperature: of the full cache's choices; 0 takes the likeliest.
            seed: of the choices.
            banned: tokens that are never chosen, such as the end of the text.

        Raises:
            KvtuneError: a prompt of one token, another model's policy, one whose tokens share
                scales, or one that could come to hold more than its limit.
        """
        check(loaded.geometry, prompt_ids, policies)
        self.loaded, self.room = loaded, room
        self.temperature, self.seed = temperature, seed
        self.banned = torch.tensor(list(banned), dtype=torch.int64, device=loaded.device)
        geometry = loaded.geometry
        full = LivePolicy(Policy.uniform(Option(), geometry.layers, geometry.kv_heads, name="full"))
        self.policies = [full, *policies]
        self.prompt_tokens = len(prompt_ids) - 1
        self.layers = self._fill(prompt_ids)
        self.generated = 0  # tokens so far
        self._refuse(lambda cache: cache.most, "could come to hold")
        self._measured = _Measured(len(self.policies), room, prompt_ids[-1], loaded.device)

    @property
    def tokens(self) -> Tensor:
        """The prompt's last token, then what the full cache has generated, ``[T + 1]``."""
        return self._measured.tokens[: self.generated + 1]

    @property
    def token_ids(self) -> list[int]:
        """What the full cache has generated."""
        found: list[int] = self.tokens[1:].tolist()
        return found

    def _fill(self, prompt_ids: Sequence[int]) -> list[list[Group]]:
        """Every layer's caches, holding the compressed prompt."""
        needs = Needs()
        for live in self.policies:
            needs |= live.policy.needs
        prompt = prompt_signals(self.loaded, prompt_ids, needs)
        budgets = [c.policy.settle(self.prompt_tokens, prompt) for c in self.policies]
        layers = []
        for layer in range(self.loaded.geometry.layers):
            signals = prompt(layer)
            shares = [
                live.policy.split(layer, planned[layer].tolist(), signals)
                for live, planned in zip(self.policies, budgets, strict=True)
            ]
            layers.append(groups(self.policies, layer, np.array(shares), signals, self.room))
        return layers

    @torch.no_grad()
    def advance(self, tokens: int) -> None:
        """Generate so many more tokens.

        Raises:
            KvtuneError: a cache has come to hold more than its policy's limit.
        """
        for _ in range(min(tokens, self.room - self.generated)):
            logits = self._step()
            self._refuse(lambda cache: cache.peak, "holds")
            self._measured.put(self.generated, logits, self._choose(logits[0]))
            self.generated += 1

    def _step(self) -> Tensor:
        """Logits of all policies for the newest token, ``[B, vocabulary]`` float32."""
        ids = self.tokens[-1].expand(len(self.policies), 1)
        at = self.prompt_tokens + self.generated
        positions = torch.full((1, 1), at, device=self.loaded.device)
        with attending(self._attend):
            output = self.loaded.model(input_ids=ids, position_ids=positions, use_cache=False)
        logits: Tensor = output.logits[:, -1].float()
        return logits

    def _attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None
    ) -> Tensor:
        """Attention of one layer, as the seam asks for it."""
        refuse_window(layer, window, self.prompt_tokens + self.generated + 1)
        queries = q[:, :, 0].float().unflatten(1, (k.shape[1], -1))  # [B, H, G, D]
        keys, values = k[:, :, 0].float(), v[:, :, 0].float()  # [B, H, D]
        output = torch.empty_like(queries)
        for group in self.layers[layer]:
            at = group.index
            output[at] = group.cache.step(queries[at], keys[at], values[at])
        return output.flatten(1, 2)[:, :, None].to(q.dtype)

    def _choose(self, logits: Tensor) -> Tensor:
        scores = logits.clone()
        scores[self.banned] = -torch.inf
        if self.temperature:
            step = torch.full((1,), self.generated, device=scores.device)
            each = torch.arange(len(scores), device=scores.device)
            scores = scores / self.temperature + gumbel(self.seed, step, each)
        return scores.argmax()

    def results(self) -> list[GenerationRun]:
        """Every policy so far, the full cache left out.

        Raises:
            KvtuneError: nothing was generated, an output is NaN, or a cache's books are wrong.
        """
        if not self.generated:
            raise KvtuneError("nothing has been generated yet")
        for layer in self.layers:
            for group in layer:
                group.cache.check_integrity()
        kl, nll, agrees = self._measured.first(self.generated)
        for row, live in enumerate(self.policies):
            if not np.isfinite(kl[row]).all():
                raise KvtuneError(f"the policy {live.name!r} made the model's output NaN")
        return [
            GenerationRun(live.name, kl[row], nll[row], nll[0], agrees[row], **self._books(row))
            for row, live in enumerate(self.policies)
            if row
        ]

    def _books(self, row: int) -> dict[str, Any]:
        """What one policy's caches counted."""
        geometry = self.loaded.geometry
        shape = (geometry.layers, geometry.kv_heads)
        evicted, trimmed, peak, steps, bits = (np.zeros(shape, np.int64) for _ in range(5))
        for layer, groups_ in enumerate(self.layers):
            for group in (group for group in groups_ if row in group.rows):
                own, at, cache = group.rows.index(row), (layer, list(group.heads)), group.cache
                evicted[at], trimmed[at] = cache.evicted[own], cache.trimmed[own]
                peak[at], steps[at] = cache.peak[own], cache.entry_steps[own]
                bits[at] = 0 if cache.method is None else cache.method.entry_bits
        return {
            "evicted": evicted,
            "trimmed": trimmed,
            "peak_entries": peak,
            "mean_bytes": self._bytes(row, lambda cache: cache.entry_steps / self.generated),
            "peak_bytes": self._bytes(row, lambda cache: cache.peak),
            "statistics_bytes": float((steps / self.generated * bits).sum() / 8),
        }

    def _bytes(self, row: int, entries: Callable[[SlotCache], NDArray[Any]]) -> float:
        """Bytes of one policy with so many entries in each head, lengths included."""
        geometry, total = self.loaded.geometry, 0.0
        for group in (group for layer in self.layers for group in layer if row in group.rows):
            own = group.rows.index(row)
            total += float(group.cache.bytes_of(entries(group.cache))[own].sum())
        return total + footprint_of_lengths(geometry.layers, geometry.kv_heads)

    def _grew(self, row: int) -> bool:
        """Whether any of a policy's heads holds more than ever before."""
        return any(
            group.cache.grew for layer in self.layers for group in layer if row in group.rows
        )

    def _refuse(self, entries: Callable[[SlotCache], NDArray[Any]], does: str) -> None:
        """Refuse policies whose heads, with so many entries each at once, exceed their limit.

        Raises:
            KvtuneError: names the first.
        """
        for row, live in enumerate(self.policies):
            limit = live.limit_bytes
            if limit is None or not self._grew(row):
                continue
            if (held := self._bytes(row, entries)) > limit:
                raise KvtuneError(
                    f"the policy {live.name!r} {does} {held:.0f} bytes, and {limit} are its limit",
                    hint="give its heads smaller budgets, or raise the limit.",
                )


def prompt_signals(loaded: LoadedModel, prompt_ids: Sequence[int], needs: Needs) -> Prompt:
    """The signals of a prompt without its last token, which is the first to be read."""
    nothing_known = 0, 1, (-1,)
    sample = Sample("generation", "evaluate", "user", tuple(prompt_ids), *nothing_known)
    return fresh_prompt(loaded, sample, needs)
