"""What a policy loses in a serving stack's own formats, of a model that need not be at hand.

Exports to a stack that evicts nothing, or has one format for all heads, run less than the plan.
What then runs is all tokens in formats whose losses are known beside those of kvtune's own 4 bits
on the packaged models, so that it has a band as a stand-in's plan has.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import numpy as np

from kvtune.common.estimate import Estimate
from kvtune.policies.export.contract import find_exporter
from kvtune.policies.export.stored_alike import loss_there
from kvtune.policies.policy import Policy
from kvtune.policies.policy_file.parts import ModelFacts
from kvtune.tuner.sources import QualitySource, stand_in_for
from kvtune.tuner.stack_formats import with_formats_of


def loss_on_stack(stack: str, policy: Policy, facts: ModelFacts) -> Estimate | None:
    """The band of a policy in a stack's own formats; None of options that no table knows."""
    source, limits = _source(stack, facts), find_exporter(stack).limits
    number = {option: at for at, option in enumerate(source.tables.options)}
    options = list(policy.options())
    if any(option not in number for option in options):
        return None
    choice = np.array([number[option] for option in options], np.int64)
    return loss_there(source.loss_of(choice), policy, limits)


@lru_cache(maxsize=32)
def _source(stack: str, facts: ModelFacts) -> QualitySource:
    source = stand_in_for(facts.layers, facts.kv_heads, facts.head_dim, facts.name)
    return replace(source, tables=with_formats_of(source.tables, find_exporter(stack).limits))
