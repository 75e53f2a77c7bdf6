"""Times and memory on this machine's GPU beside those that were predicted for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from kvtune.common.errors import KvtuneError
from kvtune.common.estimate import Estimate
from kvtune.policies.policy import Policy
from kvtune.profiles.gpus import GpuProfile, detect_gpu
from kvtune.profiles.shape import ModelShape
from kvtune.runtime.device import Bench, bench_for, collecting_little
from kvtune.runtime.largest import Bounds, Largest, find_largest
from kvtune.runtime.promise import Within, run_within
from kvtune.runtime.timing import NEW_TOKENS, Beside, Decoding, time_beside, uncompressed
from kvtune.traces.models import LoadedModel
from kvtune.traces.samples import Sample
from kvtune.tuner.expected import Card, Expected, ExpectedLargest, Pair

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Most:
    """The largest batches that fit.

    Args:
        plan: measured.
        full_cache: measured, uncompressed.
        predicted: of both by the same names; empty for a card or model that is not known.
    """

    plan: Largest[Decoding]
    full_cache: Largest[Decoding]
    predicted: Mapping[str, ExpectedLargest]

    @property
    def ratios(self) -> dict[str, float] | None:
        """Plan to uncompressed; None where one of them did not run at all."""
        plan, full = self.plan.found, self.full_cache.found
        if not (plan and full):
            return None
        rates = plan.tokens_per_second.value / full.tokens_per_second.value
        return {"batch": plan.batch / full.batch, "tokens_per_second": rates}

    def pairs(self) -> Iterator[Pair]:
        """Predicted figures with their measurements."""
        for name, predicted in self.predicted.items():
            yield from predicted.pairs(getattr(self, name))

    def as_dict(self) -> dict[str, object]:
        """The form that goes into JSON."""
        return {
            "plan": _plain(self.plan),
            "full_cache": _plain(self.full_cache),
            "ratios": self.ratios,
            "predicted": dict(self.predicted) or None,
        }


@dataclass(frozen=True)
class Served:
    """What a plan was printed for.

    Args:
        batch: sequences at once.
        context_tokens: of each prompt.
        generated_tokens: of each sequence.
        limit_bytes: of the whole process.
        peak: that was printed.
    """

    batch: int
    context_tokens: int
    generated_tokens: int
    limit_bytes: int
    peak: Estimate


@dataclass(frozen=True)
class Promise:
    """A plan that was run as it was printed, within its limit.

    Args:
        printed: the peak that was printed.
        run: what it took.
    """

    printed: Estimate
    run: Within

    def as_dict(self) -> dict[str, object]:
        """The form that goes into JSON."""
        return {
            "kept": self.run.kept,
            "printed_peak": self.printed.as_dict(),
            "process_bytes": self.run.process_bytes,
            **asdict(self.run),
        }


@dataclass(frozen=True)
class Coverage:
    """How many measured figures lie inside their predicted intervals.

    Args:
        inside: so many.
        of: of so many.
    """

    inside: int
    of: int


@dataclass(frozen=True)
class Times:
    """Times and memory of a plan on this machine's GPU.

    Args:
        gpu: slug of its profile; None for a card without one, of which nothing is predicted.
        measured: the plan and the uncompressed cache, in the same run.
        plan: predicted, or None.
        full_cache: predicted, or None.
        most: the largest batches, where they were asked for.
        within: the plan as it was printed, run to its end within its limit, where there is one.
    """

    gpu: str | None
    measured: Beside
    plan: Expected | None
    full_cache: Expected | None
    most: Most | None = None
    within: Promise | None = None

    @property
    def coverage(self) -> Coverage | None:
        """Of all that was predicted; None if nothing was. Four of five are expected inside."""
        pairs = [*(self.most.pairs() if self.most else ())]
        for predicted, measured in (
            (self.plan, self.measured.plan),
            (self.full_cache, self.measured.full_cache),
        ):
            pairs += predicted.pairs(measured) if predicted else ()
        inside = [guess.low <= found <= guess.high for guess, found in pairs]
        return Coverage(sum(inside), len(inside)) if inside else None

    def as_dict(self) -> dict[str, object]:
        """The form that goes into JSON."""
        found = self.measured
        return {
            "gpu": self.gpu,
            "context_tokens": found.prompt_tokens,
            "plan": found.plan,
            "full_cache": found.full_cache,
            "ratios": found.ratios,
            "predicted": {"plan": self.plan, "full_cache": self.full_cache},
            "largest": self.most,
            "within": self.within,
            "coverage": self.coverage,
        }


def time_plan(
    policy: Policy,
    loaded: LoadedModel,
    shape: ModelShape,
    samples: Sequence[Sample],
    *,
    batch: int = 1,
    context_tokens: int | None = None,
    largest: Bounds | None = None,
    served: Served | None = None,
    bench_of: Callable[[str], Bench] = bench_for,
) -> Times:
    """Run a policy and the uncompressed cache in the paged runtime, and predict both.

    Args:
        policy: for the model's shape.
        loaded: the model, on the GPU.
        shape: the same model, as the simulator knows it.
        samples: whose texts the prompts are made of.
        batch: sequences at once, halved until they fit.
        context_tokens: of each prompt; None for a sample's own.
        largest: how long to look for the largest batch that fits; None not to.
        served: what the plan is run for, whole, within its limit; None not to.
        bench_of: gives a device's bench.

    Raises:
        KvtuneError: no GPU, or a policy that the paged runtime cannot store; it says which.
    """
    bench = bench_of(loaded.device)
    tokens = min(context_tokens or samples[0].prompt, loaded.geometry.max_context)
    within = _promise(policy, loaded, samples, served, bench) if served else None
    prompts = _prompts(loaded, samples, batch, tokens)
    measured = time_beside(policy, loaded.model, prompts, bench)
    gpu = present_gpu()
    card = Card(shape, gpu, tokens) if gpu and _known(shape, loaded, tokens) else None
    both = {"plan": policy, "full_cache": uncompressed(policy)}
    many = measured.plan.batch
    expected = {name: card.expect(one, many) for name, one in both.items()} if card else {}
    return Times(
        gpu.slug if gpu else None,
        measured,
        expected.get("plan"),
        expected.get("full_cache"),
        _most(both, loaded, prompts[:1], card, bench, largest) if largest else None,
        within,
    )


def _promise(
    policy: Policy,
    loaded: LoadedModel,
    samples: Sequence[Sample],
    served: Served,
    bench: Bench,
) -> Promise:
    """All that was printed, to the end."""
    prompts = _prompts(loaded, samples, served.batch, served.context_tokens)
    run = run_within(
        policy, loaded.model, prompts, served.generated_tokens, served.limit_bytes, bench
    )
    return Promise(served.peak, run)


def times_or_reason(
    policy: Policy,
    loaded: LoadedModel,
    shape: ModelShape,
    samples: Sequence[Sample],
    *,
    batch: int | None = None,
    context_tokens: int | None = None,
    largest: Bounds | None = None,
    served: Served | None = None,
) -> tuple[Times | None, str | None]:
    """What ``time_plan`` finds, or why there are no times; None for one sequence at once."""
    try:
        with collecting_little():
            times = time_plan(
                policy, loaded, shape, samples, batch=batch or 1, context_tokens=context_tokens,
                largest=largest, served=served,
            )  # fmt: skip
    except KvtuneError as reason:
        return None, reason.message
    return times, None


def _most(
    policies: Mapping[str, Policy],
    loaded: LoadedModel,
    prompt: Tensor,
    card: Card | None,
    bench: Bench,
    bounds: Bounds,
) -> Most:
    """Predicted, and then looked for from there."""
    predicted = {name: card.expect_largest(p) for name, p in policies.items()} if card else {}

    def find(name: str) -> Largest[Decoding]:
        guess = int(predicted[name].batch.value) if name in predicted else None
        return find_largest(policies[name], loaded.model, prompt, bench, guess, bounds)

    return Most(find("plan"), find("full_cache"), predicted)


def _plain(found: Largest[Decoding]) -> dict[str, object]:
    return {
        "batch": found.batch,
        "too_large": found.too_large,
        "exact": found.is_exact,
        "tries": found.tries,
        "measured": found.found,
    }


def _prompts(loaded: LoadedModel, samples: Sequence[Sample], batch: int, tokens: int) -> Tensor:
    """``[B, P]`` token ids: the samples' texts one after another, each begun by as many prompts.

    Those that begin with the same sample are the same, and neighbours.
    """
    import torch

    rows = []
    for row in range(batch):
        at = row * len(samples) // batch
        text = [token for sample in (*samples[at:], *samples[:at]) for token in sample.token_ids]
        rows.append((text * -(-tokens // len(text)))[:tokens])
    return torch.tensor(rows, device=loaded.device)


def present_gpu() -> GpuProfile | None:
    """This machine's; None without one, or for a card without a profile."""
    try:
        return detect_gpu()
    except KvtuneError:  # a card without a profile
        return None


def _known(shape: ModelShape, loaded: LoadedModel, tokens: int) -> bool:
    """Whether the simulator answers for such a model and prompts of so many tokens."""
    whole = shape.keeps_all(tokens + NEW_TOKENS)
    return whole and loaded.dtype != "float32"
