"""Helper processes of a search on a GPU: capture, tables, replays and live runs are shared out.

All of these are bound by Python, which keeps one processor and hardly a fifth of a GPU busy. A few
processes on the same GPU do one sample each, by the same code and in the same batches, and leave
what they find where this process looks for it first. Whatever fails is done by this process alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from kvtune.common.helpers import Helpers, is_helper
from kvtune.common.kept import Kept
from kvtune.common.processors import processors
from kvtune.common.progress import Progress, Silent
from kvtune.policies.policy import Policy
from kvtune.profiles.gpus import smallest_free_bytes
from kvtune.tuner.request import SearchRequest

if TYPE_CHECKING:
    from kvtune.runtime.compiled_ahead import Compiling
    from kvtune.simulator.quality.tables import Floats
    from kvtune.traces.models import LoadedModel
    from kvtune.traces.samples import Sample
    from kvtune.traces.trace import SampleRecord
    from kvtune.tuner.sources import QualitySource
    from kvtune.tuner.validate import Validation

DEVICES = ("cuda",)
"""On which helpers run: processors are kept busy by one process."""
MOST = 4
"""Helpers at most: a GPU serves processes by turns."""
PROCESSORS_EACH = 3
"""Of this machine: Python takes one, reading and writing traces the others."""
SHARE_OF_CARD = 0.25
"""Of the card's free memory, what all helpers may take."""
TAKES_BYTES = 4 * 2**30
"""What a helper takes beside weights: its context, and one sample's activations."""

LONGEST_S = 1800.0
"""For one sample or for loading the model, which take seconds: a helper that takes longer hangs."""

T = TypeVar("T")


@dataclass
class Beside:
    """Helpers, as long as none has failed, and processes that compile.

    Args:
        executor: of the helpers; None once they have ended.
        compiling: kernels; None where none are.
        compiles: whether kernels may still be begun; not once that has failed.
    """

    executor: Executor | None
    compiling: Compiling | None = None
    compiles: bool = True

    def tried(self, do: Callable[[Executor], T], progress: Progress) -> T | None:
        """What is done with the helpers; None where they have failed or ended."""
        if self.executor is None:
            return None
        try:
            return do(self.executor)
        except Exception as error:
            progress.note(f"helper processes are given up, this one goes on alone: {error}")
            self.end_helpers()
            return None

    def compiles_for(self, device: str) -> bool:
        """Whether a plan is timed on such a device, by kernels that are compiled."""
        return self.compiles and device.startswith("cuda")

    def compile(self, policies: Sequence[Policy], loaded: LoadedModel, progress: Progress) -> None:
        """Begin to compile the kernels of policies that were not begun before."""
        try:
            from kvtune.runtime.compiled_ahead import Compiling

            self.compiling = self.compiling or Compiling()
            self.compiling.begin(policies, loaded.geometry, loaded.model)
        except Exception as error:  # whoever launches a kernel compiles it
            progress.note(f"kernels are not compiled ahead: {error}")
            self.compiles = False

    def finish(self, progress: Progress) -> None:
        """Wait for the kernels and end all processes, so that the GPU is this process's own."""
        self.end_helpers()
        if self.compiling is not None:
            self.compiling.wait(progress)

    def used_on(self, device: str) -> Beside:
        """Itself, its processes ended where the model came to run on a device that needs none."""
        if not _shares(device):
            self.end_helpers()
        return self

    def end(self) -> None:
        """End all processes, whatever they are at."""
        self.end_helpers()
        if self.compiling is not None:
            self.compiling.end()

    def end_helpers(self) -> None:
        """End those that capture, replay and run live."""
        if self.executor is not None:
            self.executor.shutdown(cancel_futures=True)
        self.executor = None


@contextmanager
def helpers_of(request: SearchRequest, progress: Progress) -> Iterator[Beside]:
    """Begin helpers where the request's model runs on a GPU, and there is room for several.

    Args:
        request: what is searched for; its menu may still be ``"auto"``, which makes no difference.
        progress: told why there are none, where they could not be begun.
    """
    count = 0 if request.engine or is_helper() or not request.has_weights else _count(request)
    beside = Beside(_begun(count, request, progress) if count else None)
    try:
        yield beside
    finally:
        beside.end()


def _begun(count: int, request: SearchRequest, progress: Progress) -> Executor | None:
    try:
        helpers = Helpers(count, LONGEST_S)
    except OSError as error:
        progress.note(f"no helper processes could be begun, this one goes on alone: {error}")
        return None
    for _ in range(count):  # one each: all are idle
        helpers.submit(prepare, request.model, request.device)
    return helpers


def _count(request: SearchRequest) -> int:
    """How many, before torch is imported, which helpers do at the same time."""
    if request.device is not None and not request.device.startswith("cuda"):
        return 0
    free = smallest_free_bytes()
    return 0 if free is None else count_for(processors(), free, 2 * request.shape.parameters)


def count_for(cores: int, free_bytes: int, weight_bytes: int) -> int:
    """Helpers for a machine's processors, a card's free memory and a model; none rather than one.

    One alone would do what this process waits for.
    """
    fitting = int(SHARE_OF_CARD * free_bytes / (weight_bytes + TAKES_BYTES))
    count = min(MOST, cores // PROCESSORS_EACH, fitting)
    return count if count > 1 else 0


def prepare(model: str, device: str | None) -> None:
    """Load the model and what works on it, before there is anything to do; by a helper."""
    import kvtune.simulator.quality.evaluate
    import kvtune.traces.capture
    import kvtune.tuner.validate  # noqa: F401
    from kvtune.traces.models import best_device, choose_dtype
    from kvtune.traces.shards import loaded_once

    device = device or best_device()
    if _shares(device):
        loaded_once(model, _own_name(device), choose_dtype(device)[0])


def _shares(device: str) -> bool:
    """Whether processes of one search are worth while on such a device."""
    return device.startswith(DEVICES)


def _own_name(device: str) -> str:
    """The device as a loaded model names it."""
    import torch

    return f"{device}:{torch.cuda.current_device()}" if device == "cuda" else device


def _left_by_helpers(
    source: QualitySource,
    part: Callable[..., None],
    samples: Sequence[str],
    what: tuple[Any, ...],
    label: str,
    progress: Progress,
) -> Progress:
    """Have helpers, if there are any, leave what they find of each sample in what is kept.

    Returns:
        What is told of this process's own run: nothing where it only reads what helpers left.
    """
    if source.beside is None or source.kept.folder is None:
        return progress

    def share(executor: Executor) -> bool:
        parts = [executor.submit(part, sample, *what) for sample in samples]
        for each in progress.track(parts, label, len(parts)):
            each.result()
        return True

    return Silent() if source.beside.tried(share, progress) else progress


def replayed(
    source: QualitySource,
    samples: Sequence[SampleRecord],
    policies: Sequence[Policy],
    *,
    every: int = 1,
    progress: Progress,
) -> Floats:
    """What ``replay_policies`` finds on a source's own trace, by helpers where there are any."""
    from kvtune.simulator.quality.evaluate import replay_policies

    trace, loaded = source.trace, source.loaded
    if trace is None or loaded is None:
        raise ValueError("a stand-in has no trace to replay")
    what = trace.root, trace.checked, policies, every, loaded.device, source.kept
    progress = _left_by_helpers(
        source, replay_part, [sample.id for sample in samples], what, "replaying policies", progress
    )
    return replay_policies(
        trace, samples, policies, every=every, device=loaded.device, progress=progress,
        kept=source.kept,
    )  # fmt: skip


def replay_part(
    sample: str,
    root: Path,
    checked: frozenset[str],
    policies: Sequence[Policy],
    every: int,
    device: str,
    kept: Kept,
) -> None:
    """Replay policies on one sample, by a helper; what they lose is left in ``kept``."""
    from kvtune.simulator.quality.evaluate import replay_policies
    from kvtune.simulator.quality.shards import trace_once

    trace = trace_once(root, checked)
    replay_policies(trace, [trace.sample(sample)], policies, every=every, device=device, kept=kept)


def ran_live(
    source: QualitySource,
    policies: Sequence[Policy],
    samples: Sequence[Sample],
    *,
    stored_alike: bool = False,
    rounding: bool = False,
    progress: Progress,
    **known: Any,
) -> list[Validation]:
    """What ``validate_policies`` finds on a source's own trace, by helpers where there are any.

    Args:
        source: of the model itself.
        policies: for its shape.
        samples: of its trace.
        stored_alike: of ``validate_policies``.
        rounding: of ``validate_policies``.
        progress: told of every sample.
        known: further arguments of ``validate_policies``, which change no result.
    """
    from kvtune.runtime.prompts import traced_prompt
    from kvtune.tuner.validate import validate_policies

    trace, loaded = source.trace, source.loaded
    if trace is None or loaded is None:
        raise ValueError("a stand-in has no model to run")
    model = loaded.name, loaded.device, loaded.dtype
    what = *model, trace.root, trace.checked, policies, stored_alike, rounding, source.kept
    progress = _left_by_helpers(
        source, live_part, [sample.id for sample in samples], what, "running live", progress
    )
    return validate_policies(
        policies,
        loaded,
        samples,
        lambda sample: traced_prompt(trace, trace.sample(sample.id), loaded.device, probes=False),
        stored_alike=stored_alike,
        rounding=rounding,
        progress=progress,
        kept=source.kept,
        **known,
    )


def live_part(
    sample: str,
    model: str,
    device: str,
    dtype: str,
    root: Path,
    checked: frozenset[str],
    policies: Sequence[Policy],
    stored_alike: bool,
    rounding: bool,
    kept: Kept,
) -> None:
    """Run policies live on one sample, by a helper; what they lose is left in ``kept``."""
    from kvtune.runtime.prompts import traced_prompt
    from kvtune.simulator.quality.shards import trace_once
    from kvtune.traces.shards import loaded_once
    from kvtune.tuner.validate import validate_policies

    loaded, trace = loaded_once(model, device, dtype), trace_once(root, checked)
    record = trace.sample(sample)
    validate_policies(
        policies, loaded, [record],
        lambda _: traced_prompt(trace, record, loaded.device, probes=False),
        stored_alike=stored_alike, rounding=rounding, kept=kept,
    )  # fmt: skip
