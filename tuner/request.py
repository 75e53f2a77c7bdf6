"""What a search is asked and what it answers, as plain frozen data: no torch, no Optuna."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from kvtune.common.estimate import Estimate
from kvtune.policies.policy import Policy
from kvtune.profiles.gpus import GpuProfile
from kvtune.profiles.models import ModelShape
from kvtune.simulator.memory.budget import MemoryBudget

if TYPE_CHECKING:
    from kvtune.tuner.timing import Times

Source = Literal["own trace", "stand-in"]


@dataclass(frozen=True)
class SearchRequest:
    """A model, a GPU, a memory limit, and how hard to look.

    Args:
        model: a known name, a Hugging Face folder or id, or a GGUF file.
        shape: the model's shape.
        gpu: the card's profile.
        memory_bytes: device memory that everything together may take.
        run_dir: where config, journal, policy and result go; resumed if it holds this search.
        weights: weight format, or "auto" for the widest that fits.
        context_tokens: prompt tokens of each sequence; the fewest, where the search may choose.
        longest_context: the most that the search may choose, in doublings; None to choose nothing.
        generated_tokens: tokens each sequence generates, cached in 16 bits.
        sequences: how many at once; None lets the search choose as many as ``largest_kl`` allows.
        largest_kl: quality loss that is acceptable, nats/token.
        trials: of the outer study.
        seed: of everything drawn.
        stand_in: use the packaged tables even where weights are at hand.
        device: for capture and live runs, "cpu" or "cuda"; None picks CUDA if there is one.
        workload: "small" (nine samples of 1024 tokens, sized for a laptop) or "full" (2048 tokens).
        menu: methods that a head may be given: "three" (snapkv, h2o, streaming_llm) or "all".
        stack: the serving stack that the plan must be expressible on, as exporters are called;
            None for any plan.
        read_bytes: that a decode step may read of each sequence's prompt; None for any.
        moved_bytes: that a decode step may bring over from the host of each sequence's prompt;
            None where all of it lies on the device.
        heads: a file of head scores, by which plans are made that are run live beside the others.
        texts: the user's own .txt or .jsonl files, searched and evaluated on instead.
    """

    model: str
    shape: ModelShape
    gpu: GpuProfile
    memory_bytes: int
    run_dir: Path
    weights: str = "auto"
    context_tokens: int = 8192
    longest_context: int | None = None
    generated_tokens: int = 256
    sequences: int | None = None
    largest_kl: float = 0.02
    trials: int = 60
    seed: int = 0
    stand_in: bool = False
    device: str | None = None
    workload: Literal["small", "full"] = "small"
    menu: Literal["three", "all"] = "three"
    stack: str | None = None
    read_bytes: int | None = None
    moved_bytes: int | None = None
    heads: Path | None = None
    texts: tuple[Path, ...] = ()

    @property
    def reads_less(self) -> bool:
        """Whether heads may hold more than a step reads of them."""
        return self.read_bytes is not None or self.moved_bytes is not None

    @property
    def contexts(self) -> tuple[int, ...]:
        """Prompt lengths to choose from: doublings of the shortest, and the longest."""
        longest = self.longest_context or self.context_tokens
        steps = [self.context_tokens]
        while 2 * steps[-1] < longest:
            steps.append(2 * steps[-1])
        return tuple(dict.fromkeys((*steps, longest)))


@dataclass(frozen=True)
class Quality:
    """A quality figure and whose it is.

    Args:
        kl: nats/token, with a 95 % interval over held-out samples, and tier; of a
            stand-in, a band.
        source: the model's own trace, or that of a stand-in.
        stand_in: the stand-in's name, or "".
        samples: held-out samples behind the figure.
    """

    kl: Estimate
    source: Source
    stand_in: str = ""
    samples: int = 0


@dataclass(frozen=True)
class FrontPoint:
    """One plan of the Pareto front: loss against tokens at once, with what it takes.

    Args:
        kl: predicted on the selection samples, nats/token.
        context_tokens: prompt tokens of each sequence.
        sequences: that fit at once under the limit.
        prompt_bytes: of one compressed prompt.
        share: of the bf16 bytes of the same prompt.
        time_per_token: of a decode step with all sequences, seconds.
        tokens_per_second: of all sequences together.
        parameters: what the study chose.
        chosen: whether this is the plan.
        band: of a stand-in, around ``kl``; None where the loss is the model's own.
    """

    kl: float
    context_tokens: int
    sequences: int
    prompt_bytes: int
    share: float
    time_per_token: Estimate
    tokens_per_second: Estimate
    parameters: dict[str, Any]
    chosen: bool = False
    band: Estimate | None = None


@dataclass(frozen=True)
class Rival:
    """The plan, or what it is compared with, at equal bytes.

    Args:
        name: for example ``uniform h2o int4``.
        family: kvtune, layers, greedy, uniform, pyramid or adakv; beside a stand-in's plan, the
            name of a method too.
        predicted: KL on held-out samples before anything ran live.
        live: the same measured live; None where no weights are at hand.
        prompt_bytes: of one compressed prompt.
        perplexity_change: live, ratio minus one; None likewise.
        retrieval_accuracy: live, share of needle digits right; None likewise.
        by_kind: predicted on held-out samples by kind of text; empty where it is off a curve.
        live_by_kind: measured on those; empty where it did not run.
        policy: what each head gets; None likewise.
    """

    name: str
    family: str
    predicted: Estimate
    live: Estimate | None
    prompt_bytes: int
    perplexity_change: Estimate | None = None
    retrieval_accuracy: Estimate | None = None
    by_kind: dict[str, float] = field(default_factory=dict)
    live_by_kind: dict[str, Estimate] = field(default_factory=dict)
    policy: Policy | None = None


@dataclass(frozen=True)
class SearchResult:
    """All that a search found.

    Args:
        request: what was asked.
        budget: device memory, weights, overhead and what is left for the cache, at that context.
        front: most tokens at once last.
        policy: the chosen plan.
        context_tokens: prompt tokens of each sequence, chosen where that was left open.
        prompt_bytes: of one compressed prompt.
        sequences: that fit at once with it.
        share: of the bf16 bytes of the same prompt.
        quality: of the plan, the best tier there is.
        predicted: of the plan, before live.
        rivals: the plan first, then the baselines.
        memory: peak of everything together, bytes.
        latency: of one decode step of all sequences, seconds.
        prefill: of one prompt, seconds.
        compression: of one prompt, beside its prefill, seconds.
        full_cache_sequences: that would fit uncompressed.
        full_cache_accuracy: retrieval accuracy of the uncompressed model, live; or None.
        counters: proof that the policy fired: tokens kept and offered, heads compressed.
        notes: automatic choices, each with its reason.
        provenance: versions, seeds, hashes.
        times: of the plan beside the uncompressed cache, measured, where it ran live on a GPU.
        untimed: why it ran there and was not timed; or None.
    """

    request: SearchRequest
    budget: MemoryBudget
    front: tuple[FrontPoint, ...]
    policy: Policy
    context_tokens: int
    prompt_bytes: int
    sequences: int
    share: float
    quality: Quality
    predicted: Quality
    rivals: tuple[Rival, ...]
    memory: Estimate
    latency: Estimate
    prefill: Estimate
    compression: Estimate
    full_cache_sequences: int
    full_cache_accuracy: Estimate | None = None
    counters: dict[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    provenance: dict[str, Any] = field(default_factory=dict)
    times: Times | None = None
    untimed: str | None = None
