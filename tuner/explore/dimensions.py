"""What plans are told apart by, beside their figures: colours of the plot, columns of the table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from kvtune.tuner.explore.axes import option_bits
from kvtune.tuner.explore.study import Study


@dataclass(frozen=True)
class Dimension:
    """A property of plans with few values.

    Args:
        name: for people.
        values: of every plan, in words.
    """

    name: str
    values: Callable[[Study], Sequence[str]]


def _split(study: Study) -> list[str]:
    words = {"heads": "by head", "layers": "by layer"}
    return [words.get(str(p.get("split")), "all alike") for p in study.plans.parameters]


def _method(study: Study) -> list[str]:
    """The method that most heads have."""
    names = [option.method.name for option in study.facts.options]
    known = sorted(set(names))
    member = np.array([[name == each for each in known] for name in names], np.float64)
    most = (study.option_counts @ member).argmax(1)
    return [known[index] for index in most.tolist()]


def _bits(study: Study) -> list[str]:
    """The mean bits of an element that heads store, rounded to a power of two."""
    bits = np.array([sum(option_bits(option)) / 2 for option in study.facts.options])
    mean = study.option_counts @ bits / study.option_counts.sum(1)
    return [f"{bits:.0f} bits" for bits in 2 ** np.log2(mean).round()]


def _context(study: Study) -> list[str]:
    return [f"{tokens} tokens" for tokens in study.plans.context_tokens.tolist()]


def _weights(study: Study) -> list[str]:
    """The format of the model's weights beside each plan."""
    return [str(name) for name in study.weights]


def in_words(study: Study, row: int) -> str:
    """A plan in a few words: its one rule, or what most of its heads have."""
    rule = study.plans.parameters[row].get("uniform")
    one = replace(study, plans=study.plans.only(row))
    (method,), (bits,), (split,) = _method(one), _bits(one), _split(one)
    return str(rule or f"{split}, mostly {method}, {bits}")


DIMENSIONS: tuple[Dimension, ...] = (
    Dimension("method of most heads", _method),
    Dimension("bits", _bits),
    Dimension("split", _split),
    Dimension("context", _context),
    Dimension("weights", _weights),
)
METHOD, BITS, SPLIT, CONTEXT, WEIGHTS = DIMENSIONS
