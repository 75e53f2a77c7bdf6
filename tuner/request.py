"""What a search is asked, as plain frozen data: no torch, no Optuna."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from kvtune.profiles.gpus import GpuProfile
from kvtune.profiles.models import ModelShape
from kvtune.tuner.limits import Limits
from kvtune.tuner.samplers import Sampler


@dataclass(frozen=True)
class SearchRequest:
    """A model, a GPU, a memory limit, and how hard to look.

    Args:
        model: a known name, a Hugging Face folder or id, or a GGUF file.
        shape: the model's shape.
        gpu: the card's profile.
        memory_bytes: device memory that everything together may take.
        run_dir: where config, journal, policy and result go; resumed if it holds this search.
        weights: weight format, or "auto" for the widest that fits; of several, separated by commas,
            or "any", the widest with which a plan does what is asked.
        context_tokens: prompt tokens of each sequence; the fewest, where the search may choose.
        longest_context: the most that the search may choose, in doublings; None to choose nothing.
        generated_tokens: tokens each sequence generates, cached in 16 bits.
        sequences: how many at once; None lets the search choose as many as ``largest_kl`` allows.
        largest_kl: quality loss that is acceptable, nats/token.
        trials: of the outer study.
        seed: of everything drawn.
        stand_in: use the packaged tables even where weights are at hand.
        device: for capture and live runs, "cpu" or "cuda"; None picks CUDA if there is one.
        workload: "small" (nine samples of 1024 tokens, sized for a laptop), "mixed" (27 of them, of
            nine kinds) or "full" (2048 tokens).
        menu: methods that a head may be given: "three" (snapkv, h2o, streaming_llm), "few" (fitted
            values and bits by channel beside them), "all", of which the best seven are replayed in
            full, or "auto", as many as the device tries without long waits.
        stack: the serving stack that the plan must be expressible on, as exporters are called;
            None for any plan.
        read_bytes: that a decode step may read of each sequence's prompt; None for any.
        limits: on time and number of sequences, which every plan has to keep to.
        sampler: which proposes trials; None for the one that their number suggests.
        jobs: trials that are asked for at once and answered side by side.
        storage: URL of the database through which workers share the trials; None for none.
        engine: what makes trace and tables: ``processes:4`` or a dask scheduler's address; None for
            this process.
        starts: policy files whose plans the search begins with.
        moved_bytes: that a decode step may bring over from the host of each sequence's prompt;
            None where all of it lies on the device.
        heads: a file of head scores, by which plans are made that are run live beside the others.
        lengths: prompt tokens that the chosen plan is also run at, where the weights are at hand;
            None for the context on a GPU, and for none on a CPU.
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
    workload: Literal["small", "mixed", "full"] = "small"
    menu: Literal["auto", "three", "few", "all"] = "auto"
    stack: str | None = None
    read_bytes: int | None = None
    limits: Limits = field(default_factory=Limits)
    sampler: Sampler | None = None
    jobs: int = 1
    storage: str | None = None
    engine: str | None = None
    starts: tuple[Path, ...] = ()
    moved_bytes: int | None = None
    heads: Path | None = None
    texts: tuple[Path, ...] = ()
    lengths: tuple[int, ...] | None = None

    @property
    def has_weights(self) -> bool:
        """Whether it names something that can be loaded."""
        from kvtune.traces.models import KNOWN

        return not self.stand_in and (self.model in KNOWN or self.model != self.shape.name)

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
