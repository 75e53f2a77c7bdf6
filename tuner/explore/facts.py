"""What all plans of a study share: the first line of ``plans.jsonl``."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, PlainValidator

from kvtune.common.bounds import Count, Loss, Name, Whole
from kvtune.common.errors import KvtuneError
from kvtune.common.estimate import BAND
from kvtune.common.stored import checked
from kvtune.policies.allocator import allocators
from kvtune.policies.option import Option
from kvtune.policies.policy import Policy
from kvtune.policies.policy_file.document import PolicyDocument, read_policy, write_policy
from kvtune.profiles.gpus import GpuProfile, find_gpu
from kvtune.profiles.shape import ModelShape
from kvtune.tuner.explore.plans import AGAIN, Size

FORMAT = 1
EACH = "each"
_LARGEST, _LARGEST_SIZE = 2**50, 2**20


def _options_of(written: Any) -> tuple[Option, ...]:
    """The options of the YAML text that ``as_plain`` wrote."""
    if not isinstance(written, str):
        raise ValueError("must be the text of a policy file")
    menu = read_policy(f"{written}\n").policy
    if not isinstance(menu, Policy):
        raise ValueError("must list its options in one layer")
    return menu.heads[0]


def _known_allocator(name: str) -> str:
    if name not in allocators():
        raise ValueError(f"{name!r} is no allocator")
    return name


@dataclass(frozen=True)
class Facts:
    """What was asked, and what every plan's line is to be read with.

    Args:
        study: key of the question; result.json names the same.
        kvtune: version that wrote it.
        shape: the model's shape.
        gpu: name of the card's profile.
        memory_bytes: that everything together may take.
        weights: weight format, or ``each`` where every plan's parameters name its own.
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
        allocators: of the last of the options, by name: those are of rules, which all heads have
            and whose budgets are divided when a prompt is known.
        stack: whose plan it is, as it lays sequences out in its own way; or "".
    """

    study: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
    kvtune: Name
    shape: ModelShape
    gpu: Name
    memory_bytes: Whole
    weights: Name
    generated_tokens: Whole
    largest_kl: Loss
    trials: Whole
    seed: Whole
    source: Literal["own trace", "stand-in"]
    stand_in: Name
    kinds: tuple[Name, ...]
    selection_samples: Whole
    held_out_samples: Whole
    measured_tokens: Count
    options: Annotated[tuple[Option, ...], PlainValidator(_options_of)]
    allocators: tuple[Annotated[str, AfterValidator(_known_allocator)], ...] = ()
    stack: Annotated[str, Field(max_length=64)] = ""

    @property
    def given(self) -> list[Policy]:
        """What a head may be given, each as a policy of one head."""
        behind = len(self.options) - len(self.allocators)
        names = ("as_given",) * behind + self.allocators
        return [
            Policy.uniform(option, 1, 1, allocator=allocators()[name]())
            for option, name in zip(self.options, names, strict=True)
        ]

    @property
    def quality(self) -> str:
        """``stand-in (smollm2-135m)`` or ``own trace``."""
        return f"stand-in ({self.stand_in})" if self.stand_in else self.source

    @property
    def layout(self) -> str:
        """How memory is counted, where that is not in kvtune's own pages; else ""."""
        return f"as {self.stack} lays plans out" if self.stack else ""

    @property
    def size(self) -> Size:
        """What every plan's line must fit."""
        heads = self.shape.layers * self.shape.kv_heads
        return Size(heads, len(self.options), len(self.kinds), BAND if self.stand_in else "table")

    @property
    def card(self) -> GpuProfile:
        """The profile of the card; raises KvtuneError where this version knows none."""
        return find_gpu(self.gpu)

    def as_plain(self) -> dict[str, Any]:
        """The form that is written."""
        plain = asdict(self) | {"options": write_policy(_menu(self.options))}
        return {"kvtune_plans": FORMAT, **plain}


def read_facts(plain: Any, where: str = "") -> Facts:
    """Facts from what was written.

    Raises:
        KvtuneError: written by a newer kvtune, or damaged.
    """
    written = dict(plain) if isinstance(plain, dict) else {}
    version = written.pop("kvtune_plans", None)
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise KvtuneError("this is no study", where=where, hint=AGAIN)
    if version > FORMAT:
        raise KvtuneError(
            f"this study was written by a newer kvtune ({written.get('kvtune', 'unknown')}), "
            f"in format {version}; this one reads up to {FORMAT}",
            hint="pip install -U kvtune.",
            where=where,
        )
    facts = checked(Facts, written, where, AGAIN)
    if len(facts.allocators) > len(facts.options):
        raise KvtuneError("it has more allocators than options", where=where, hint=AGAIN)
    _check_shape(facts.shape, where)
    return facts


def _check_shape(shape: ModelShape, where: str) -> None:
    """Refuse a model that none is like; what is derived from it then stays within numbers."""
    numbers = [value for value in vars(shape).values() if type(value) is int]
    sizes = (shape.layers, shape.query_heads, shape.kv_heads, shape.head_dim)
    windows = [window for window in shape.windows if window is not None]
    if min(sizes + tuple(windows)) < 1 or min(numbers) < 0 or max(numbers + windows) > _LARGEST:
        raise KvtuneError("'shape' is no model's", where=where, hint=AGAIN)
    if max(sizes) > _LARGEST_SIZE or len(shape.windows) != shape.layers:
        raise KvtuneError("'shape' is no model's", where=where, hint=AGAIN)


def _menu(options: tuple[Option, ...]) -> PolicyDocument:
    return PolicyDocument(policy=Policy("options", (options,)))
