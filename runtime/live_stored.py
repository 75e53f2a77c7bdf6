"""A policy live on a model as a serving stack runs it that stores each token as it comes.

Such a stack reads a prompt through what it has stored of it, layer by layer, and stores the answer
likewise. A format of single tokens is the same whenever a token is stored, so that one pass over
all tokens does what the stack does token by token; of others the answer is read so.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvtune.common.errors import KvtuneError
from kvtune.policies.format import Format, Role
from kvtune.policies.option import Option
from kvtune.policies.policy import Policy
from kvtune.runtime.live import LiveRun, Reference, measured
from kvtune.traces.models import LoadedModel
from kvtune.traces.passes import run_observed, run_whole
from kvtune.traces.samples import Sample
from kvtune.traces.seam import causal_attention


def run_stored(
    loaded: LoadedModel, sample: Sample, policies: Sequence[Policy], full: Tensor
) -> list[LiveRun]:
    """Run one sample under every policy, prompts and answers stored alike.

    Args:
        loaded: the model.
        sample: what it reads.
        policies: for this model's shape, which keep all tokens.
        full: what ``full_cache`` says of the sample.

    Raises:
        KvtuneError: a policy has another shape, drops tokens, or makes the output NaN.
    """
    geometry = loaded.geometry
    for policy in policies:
        policy.check_fits(geometry.layers, geometry.kv_heads)
        check_keeps_all(policy, sample.prompt)
    reference = Reference.of(full, sample)
    return [_run(loaded, sample, policy, reference) for policy in policies]


def check_keeps_all(policy: Policy, prompt_tokens: int) -> None:
    """Refuse a policy that drops tokens of a prompt.

    Raises:
        KvtuneError: names the option.
    """
    for option in policy.options():
        if option.budget.resolve(prompt_tokens) < prompt_tokens:
            raise KvtuneError(
                f"{option.label!r} drops tokens, and a stack that stores answers as it stores "
                "prompts keeps all of them",
                hint="without --for the policy runs as kvtune's own runtime serves it.",
            )


def _run(loaded: LoadedModel, sample: Sample, policy: Policy, reference: Reference) -> LiveRun:
    paged = any(form.page_tokens > 1 for o in policy.options() for form in (o.keys, o.values))
    logits = (_token_by_token if paged else _in_one_pass)(loaded, sample, policy)
    shape = len(policy.heads), len(policy.heads[0])
    return measured(
        policy,
        reference,
        logits,
        torch.full(shape, sample.prompt),
        policy.footprint(sample.prompt, loaded.geometry.head_dim),
    )


def _in_one_pass(loaded: LoadedModel, sample: Sample, policy: Policy) -> Tensor:
    """Logits of the observed tokens; of formats of single tokens, which never change again."""

    def handler(
        layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None
    ) -> Tensor:
        options = policy.heads[layer]
        keys, values = stored(k, options, "keys"), stored(v, options, "values")
        return causal_attention(q, keys, values, scale, window)

    return run_whole(loaded, sample.token_ids, len(sample.targets), handler)


def _token_by_token(loaded: LoadedModel, sample: Sample, policy: Policy) -> Tensor:
    """The same where a page that is not full is stored again with each token of the answer."""
    held: dict[tuple[int, Role], Tensor] = {}

    def joined(layer: int, new: Tensor, role: Role) -> Tensor:
        """All that is stored of a layer by now, its last page anew."""
        options = policy.heads[layer]
        page = max((o.keys if role == "keys" else o.values).page_tokens for o in options)
        before = held.get((layer, role), new[:, :, :0])
        whole = before.shape[2] // page * page
        last = torch.cat([before[:, :, whole:], new], 2)
        held[layer, role] = torch.cat([before[:, :, :whole], stored(last, options, role)], 2)
        return held[layer, role]

    def handler(
        layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None
    ) -> Tensor:
        keys, values = joined(layer, k, "keys"), joined(layer, v, "values")
        return causal_attention(q, keys, values, scale, window)

    ids, prompt = sample.token_ids, sample.prompt
    run_whole(loaded, ids[:prompt], 1, handler)
    with torch.no_grad():
        steps = [
            run_observed(loaded, ids[at : at + 1], at, handler) for at in range(prompt, len(ids))
        ]
    return torch.cat(steps, 1)[0]


def stored(tensor: Tensor, options: Sequence[Option], role: Role) -> Tensor:
    """What a reader gets back of keys or values ``[1, H, T, D]``, each head in its own format."""
    heads: dict[Format, list[int]] = {}
    for head, option in enumerate(options):
        heads.setdefault(option.keys if role == "keys" else option.values, []).append(head)
    found = tensor.clone()
    for form, which in heads.items():
        rows = tensor[0, which]
        counts = torch.full((len(which),), rows.shape[1], device=rows.device)
        found[0, which] = form.roundtrip(rows, counts, role).to(tensor.dtype)
    return found
