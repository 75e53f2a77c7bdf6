"""What all plans of a study share: the first line of ``plans.jsonl``."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from kvtune.common.errors import KvtuneError
from kvtune.policies.document import PolicyDocument, read_policy, write_policy
from kvtune.policies.option import Option
from kvtune.policies.policy import Policy
from kvtune.profiles.gpus import GpuProfile, find_gpu
from kvtune.profiles.shape import Experts, LatentAttention, ModelShape

FORMAT = 1


@dataclass(frozen=True)
class Facts:
    """What was asked, and what every plan's line is to be read with.

    Args:
        study: key of the question; result.json names the same.
        kvtune: version that wrote it.
        shape: the model's shape.
        gpu: name of the card's profile.
        memory_bytes: that everything together may take.
        weights: weight format that was asked for, or ``auto``.
        generated_tokens: that each sequence generates, in 16 bits.
        largest_kl: loss that is acceptable, nats/token.
        trials: that the study is to have.
        seed: of everything drawn.
        source: ``own trace`` or ``stand-in``.
        stand_in: whose trace stood in, or "".
        kinds: of held-out text, in the order of the lines' figures.
        selection_samples: that plans are judged on.
        held_out_samples: that no plan was chosen on.
        measured_tokens: prompt tokens of the samples.
        options: what a head may be given; lines hold their numbers.
    """

    study: str
    kvtune: str
    shape: ModelShape
    gpu: str
    memory_bytes: int
    weights: str
    generated_tokens: int
    largest_kl: float
    trials: int
    seed: int
    source: str
    stand_in: str
    kinds: tuple[str, ...]
    selection_samples: int
    held_out_samples: int
    measured_tokens: int
    options: tuple[Option, ...]

    @property
    def quality(self) -> str:
        """``stand-in (smollm2-135m)`` or ``own trace``."""
        return f"stand-in ({self.stand_in})" if self.stand_in else self.source

    @property
    def card(self) -> GpuProfile:
        """The profile of the card; raises KvtuneError where this version knows none."""
        return find_gpu(self.gpu)

    def as_plain(self) -> dict[str, Any]:
        """The form that is written."""
        plain = asdict(self) | {"options": write_policy(_menu(self.options))}
        return {"kvtune_plans": FORMAT, **plain}


def read_facts(plain: dict[str, Any]) -> Facts:
    """Facts from what was written.

    Raises:
        KvtuneError: written by a newer kvtune.
        KeyError, TypeError, ValueError: damaged.
    """
    written = dict(plain)
    version = written.pop("kvtune_plans")
    if version > FORMAT:
        raise KvtuneError(
            f"this study was written by a newer kvtune ({written.get('kvtune', 'unknown')}), "
            f"in format {version}; this one reads up to {FORMAT}",
            hint="pip install -U kvtune.",
        )
    menu = read_policy(written["options"]).policy
    if not isinstance(menu, Policy):
        raise ValueError("the options are no list")
    shape = _shape(written["shape"])
    kinds = tuple(written["kinds"])
    return Facts(**written | {"options": menu.heads[0], "shape": shape, "kinds": kinds})


def _menu(options: tuple[Option, ...]) -> PolicyDocument:
    return PolicyDocument(policy=Policy("options", (options,)))


def _shape(plain: dict[str, Any]) -> ModelShape:
    parts = {
        "windows": tuple(plain["windows"]),
        "aliases": tuple(plain["aliases"]),
        "latent": LatentAttention(**plain["latent"]) if plain["latent"] else None,
        "experts": Experts(**plain["experts"]) if plain["experts"] else None,
    }
    return ModelShape(**plain | parts)
