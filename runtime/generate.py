"""Generating tokens while the cache evicts, on the real model, held against the full cache.

The full cache, the first policy, chooses the tokens; every policy reads those same tokens from a
cache of its own. Several prompts are rows of one batch, so that a step is launched once for all.
Each layer's entries live in slots, grouped by method, and a method that evicts while decoding does
so after each token, in each layer, with what that layer has become under the policy: errors feed on
each other, as they would in service. Float32 inside.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvtune.common.captured_steps import Steps
from kvtune.common.errors import KvtuneError
from kvtune.policies.noise import first_mixed, gumbel
from kvtune.policies.option import Option
from kvtune.policies.policy import Policy
from kvtune.policies.signals import Needs
from kvtune.runtime.generation_books import Books
from kvtune.runtime.generation_run import GenerationRun, Measured
from kvtune.runtime.live_policies import Group, LivePolicy, check, groups, side_by_side
from kvtune.runtime.prompts import Prompt, fresh_prompt, refuse_window
from kvtune.traces.models import LoadedModel
from kvtune.traces.samples import Sample
from kvtune.traces.seam import attending


class Generations:
    """Texts that are generated side by side, each under the same policies, in stretches.

    Life: build it (the prompts run), ``advance`` as often as wanted, ``runs``. What a step
    takes is mostly what it launches, so that several prompts take little longer than one.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        prompts: Sequence[Sequence[int]],
        policies: Sequence[LivePolicy],
        *,
        room: int,
        temperature: float = 0.0,
        seeds: Sequence[int] = (),
        banned: Sequence[int] = (),
    ) -> None:
        """Run the prompts and fill every cache.

        Args:
            loaded: the model.
            prompts: equally long, two tokens or more each; the last token is the first to be read
                from the caches.
            policies: policies of this model's shape, whose formats store each token apart.
            room: tokens that will be generated at most.
            temperature: of the full cache's choices; 0 takes the likeliest.
            seeds: of each prompt's choices; 0, 1, 2... unless given.
            banned: tokens that are never chosen, such as the end of the text.

        Raises:
            KvtuneError: prompts of one token or of several lengths, another model's policy, one
                whose tokens share scales, or one that could come to hold more than its limit.
        """
        for prompt in prompts:
            check(loaded.geometry, prompt, policies)
        if len({len(prompt) for prompt in prompts}) != 1:
            raise KvtuneError(
                "texts that are generated side by side need equally long prompts",
                hint="cut them to the shortest, or generate from each by itself (Generation).",
            )
        self.loaded, self.room, self.temperature = loaded, room, temperature
        geometry, device = loaded.geometry, loaded.device
        full = LivePolicy(Policy.uniform(Option(), geometry.layers, geometry.kv_heads, name="full"))
        self.policies, self.prompts = [full, *policies], len(prompts)
        self.prompt_tokens = len(prompts[0]) - 1
        self.banned = torch.tensor(list(banned), dtype=torch.int64, device=device)
        each = seeds or range(len(prompts))
        self._seeds = torch.tensor([[first_mixed(seed)] for seed in each], device=device)
        self.layers = self._fill(prompts)
        self.generated = 0  # tokens so far
        self._books = Books(self.layers, self.policies, self.prompts, geometry)
        self._books.refuse(lambda cache: cache.most, "could come to hold")
        first = torch.tensor([prompt[-1] for prompt in prompts], device=device)
        self._measured = Measured(len(self.policies), first, room)
        self._newest = first.repeat(len(self.policies))[:, None]  # [B * P, 1], a policy's together
        self._at = torch.full((1, 1), self.prompt_tokens - 1, device=device)  # its position
        self.steps = Steps(self._step, captures=self._can_be_captured)

    @property
    def _can_be_captured(self) -> bool:
        methods = {group.cache.method for group in self._groups}
        by_host = any(method.reads_step_number for method in methods if method is not None)
        return "cuda" in self.loaded.device and not by_host

    @property
    def _groups(self) -> Iterator[Group]:
        return (group for layer in self.layers for group in layer)

    def tokens_of(self, prompt: int) -> Tensor:
        """The prompt's last token, then what its full cache has generated, ``[T + 1]``."""
        return self._measured.tokens[prompt, : self.generated + 1]

    def _fill(self, prompts: Sequence[Sequence[int]]) -> list[list[Group]]:
        """Every layer's caches, holding the compressed prompts."""
        needs = Needs()
        for live in self.policies:
            needs |= live.policy.needs
        each = [self._filled(prompt_signals(self.loaded, ids, needs)) for ids in prompts]
        return [side_by_side(layer) for layer in zip(*each, strict=True)]

    def _filled(self, prompt: Prompt) -> list[list[Group]]:
        """Every layer's caches of one prompt."""
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
        """Generate so many more tokens of each text.

        Raises:
            KvtuneError: a cache has come to hold more than its policy's limit.
        """
        caches = [group.cache for group in self._groups]
        for _ in range(min(tokens, self.room - self.generated)):
            self._refuse_windows()
            for cache in caches:
                cache.prepare()
            self.steps.run(tuple(cache.pattern for cache in caches))
            for cache in caches:
                cache.count()
            self._books.refuse(lambda cache: cache.peak, "holds")
            self.generated += 1

    def _refuse_windows(self) -> None:
        for layer, window in enumerate(self.loaded.geometry.windows):
            refuse_window(layer, window, self.prompt_tokens + self.generated + 1)

    def _step(self) -> None:
        """What the device does in a step: reads the newest tokens, measures, chooses the next."""
        self._at += 1
        with attending(self._attend):
            output = self.loaded.model(
                input_ids=self._newest, position_ids=self._at, use_cache=False
            )
        logits = output.logits[:, -1].float().unflatten(0, (len(self.policies), self.prompts))
        step = self._at[0] - self.prompt_tokens
        chosen = self._choose(logits[0], step)
        self._measured.put(step, logits, chosen)
        self._newest.copy_(chosen.repeat(len(self.policies))[:, None])

    def _attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None
    ) -> Tensor:
        """Attention of one layer, as the seam asks for it."""
        queries = q[:, :, 0].float().unflatten(1, (k.shape[1], -1))  # [B * P, H, G, D]
        keys, values = k[:, :, 0].float(), v[:, :, 0].float()  # [B * P, H, D]
        output = torch.empty_like(queries)
        for group in self.layers[layer]:
            at = group.index
            output[at] = group.cache.attend(queries[at], keys[at], values[at])
        return output.flatten(1, 2)[:, :, None].to(q.dtype)

    def _choose(self, logits: Tensor, step: Tensor) -> Tensor:
        """The next token of each text, ``[P]`` of ``[P, vocabulary]``."""
        scores = logits.index_fill(-1, self.banned, -torch.inf)
        if self.temperature:
            each = torch.arange(scores.shape[-1], device=scores.device)
            scores = scores / self.temperature + gumbel(0, step + self._seeds, each)
        return scores.argmax(-1)

    def runs(self) -> list[list[GenerationRun]]:
        """Every policy on each text so far, the full cache left out.

        Raises:
            KvtuneError: nothing was generated, an output is NaN, or a cache's books are wrong.
        """
        if not self.generated:
            raise KvtuneError("nothing has been generated yet")
        for group in self._groups:
            group.cache.check_integrity()
        kl, nll, agrees = self._measured.first(self.generated)
        for live, losses in zip(self.policies, kl, strict=True):
            if not np.isfinite(losses).all():
                raise KvtuneError(f"the policy {live.name!r} made the model's output NaN")
        return [
            [
                GenerationRun(
                    live.name, kl[at, text], nll[at, text], nll[0, text], agrees[at, text],
                    **self._books.of_row(at * self.prompts + text, self.generated),
                )
                for at, live in enumerate(self.policies)
                if at
            ]
            for text in range(self.prompts)
        ]  # fmt: skip


class Generation(Generations):
    """One text; the arguments are those of ``Generations``."""

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
        more: dict[str, Any] = {"temperature": temperature, "seeds": [seed], "banned": banned}
        super().__init__(loaded, [prompt_ids], policies, room=room, **more)

    @property
    def token_ids(self) -> list[int]:
        """What the full cache has generated."""
        found: list[int] = self.tokens_of(0)[1:].tolist()
        return found

    def results(self) -> list[GenerationRun]:
        """Every policy so far, the full cache left out; see ``runs``."""
        return self.runs()[0]


def prompt_signals(loaded: LoadedModel, prompt_ids: Sequence[int], needs: Needs) -> Prompt:
    """The signals of a prompt without its last token, which is the first to be read."""
    nothing_known = 0, 1, (-1,)
    sample = Sample("generation", "evaluate", "user", tuple(prompt_ids), *nothing_known)
    return fresh_prompt(loaded, sample, needs)
