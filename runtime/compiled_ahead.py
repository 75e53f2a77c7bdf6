"""A plan's kernels, compiled by processes of their own while this one does something else.

Triton compiles a kernel when it is first launched, one after another, and a plan of many formats
needs about a dozen of them, which take longer than everything that they are then timed at. Which
these are follows from the plan, so that idle processors can compile them as soon as it is chosen.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from kvtune.common.processors import processors
from kvtune.common.progress import Progress
from kvtune.policies.page_formats import is_blocks
from kvtune.policies.pages import PageLayout
from kvtune.policies.placement import pages_of
from kvtune.policies.policy import Policy
from kvtune.runtime.kernels.launch import shape_for

if TYPE_CHECKING:
    from kvtune.traces.geometry import Geometry


PROCESSES = 8
"""At most, and no more than every second processor: others have work too."""
LONGEST_WAIT_S = 60.0
"""After which a process is ended: whatever holds it up, kernels are then compiled as ever."""


@dataclass(frozen=True)
class Kernels:
    """What one process compiles: plain data, which is sent to it.

    Args:
        target: the GPU as Triton names it: backend, architecture, threads of a warp.
        query_heads: Hq.
        kv_heads: H.
        head_dim: D.
        scale: factor of the scores before the softmax.
        dtype: of the model's weights, by torch's name.
        widths: channels of the model's rows and of its feed-forward part; None where norms and
            activations are not compiled.
        decode: of each decode kernel, the formats of a layer's pages, and the fields of ``Shape``.
        stored: names of the keys' and the values' format of pages that prompts are written to.
        column_sums: whether methods ask what attention each key of a prompt receives.
    """

    target: tuple[str, int, int]
    query_heads: int
    kv_heads: int
    head_dim: int
    scale: float
    dtype: str
    widths: tuple[int, int] | None = None
    decode: tuple[tuple[tuple[int, ...], dict[str, int | None]], ...] = ()
    stored: tuple[tuple[str, str], ...] = ()
    column_sums: bool = False

    @property
    def group(self) -> int:
        """Query heads that share one KV head, G."""
        return self.query_heads // self.kv_heads

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to compile."""
        return not (self.widths or self.decode or self.stored or self.column_sums)

    def text(self) -> str:
        """The form that is sent to the process."""
        return json.dumps(asdict(self))

    @staticmethod
    def of_text(text: str) -> Kernels:
        """What ``text`` was made of."""
        given = json.loads(text)
        given["target"], widths = tuple(given["target"]), given["widths"]
        given["widths"] = None if widths is None else tuple(widths)
        given["decode"] = tuple((tuple(pairs), shape) for pairs, shape in given["decode"])
        given["stored"] = tuple((keys, values) for keys, values in given["stored"])
        return Kernels(**given)

    def beyond(self, others: Kernels) -> Kernels:
        """Those that are not among others."""
        return replace(
            self,
            widths=None if others.widths else self.widths,
            decode=tuple(each for each in self.decode if each not in others.decode),
            stored=tuple(each for each in self.stored if each not in others.stored),
            column_sums=self.column_sums and not others.column_sums,
        )

    def shares(self, count: int) -> list[Kernels]:
        """The same in so many parts of about equal work, empty ones left out.

        A decode kernel takes as long as it has formats, and all else together about as long as one.
        """
        parts = [
            replace(self, widths=None, decode=(), stored=(), column_sums=False)
            for _ in range(count)
        ]
        work = [0] * count
        for made in sorted(self.decode, key=lambda each: -len(each[0])):
            at = work.index(min(work))
            parts[at] = replace(parts[at], decode=(*parts[at].decode, made))
            work[at] += len(made[0])
        at = work.index(min(work))
        parts[at] = replace(
            parts[at], widths=self.widths, stored=self.stored, column_sums=self.column_sums
        )
        return [part for part in parts if not part.is_empty]


def kernels_of(
    policies: Sequence[Policy], geometry: Geometry, config: Any, dtype: str, target: Any
) -> Kernels:
    """What prompts and decode steps of a model launch under these policies.

    Args:
        policies: for the model's shape.
        geometry: of the model.
        config: transformers' own, of the model.
        dtype: of its weights, by torch's name.
        target: of ``Kernels``.
    """
    growing = PageLayout(geometry.head_dim)
    layouts: dict[PageLayout, None] = {growing: None}
    layers: dict[tuple[int, ...], None] = {}
    for policy in policies:
        for heads in policy.heads:
            own = {pages_of(option, geometry.head_dim) for option in heads} | {growing}
            layouts |= dict.fromkeys(sorted(own, key=lambda layout: layout.code))
            layers[tuple(sorted((layout.code for layout in own), reverse=True))] = None
    return Kernels(
        target=target,
        query_heads=geometry.query_heads,
        kv_heads=geometry.kv_heads,
        head_dim=geometry.head_dim,
        scale=geometry.scale,
        dtype=dtype,
        widths=_widths(config),
        decode=tuple((pairs, asdict(shape_for(pairs, geometry.head_dim))) for pairs in layers),
        stored=tuple((each.keys, each.values) for each in layouts if _one_kernel_writes(each)),
        column_sums=any(policy.needs.column_sums for policy in policies),
    )


def _widths(config: Any) -> tuple[int, int] | None:
    """Of models whose norms and activations ``fuse`` replaces by the kernels of Llama."""
    silu = getattr(config, "hidden_act", None) in ("silu", "swish")
    return (config.hidden_size, config.intermediate_size) if silu else None


def _one_kernel_writes(layout: PageLayout) -> bool:
    """Whether pages of this layout are not written by plain torch."""
    return not (layout.has_tables or is_blocks(layout.keys) or is_blocks(layout.values))


def aimed_at(model: Any) -> tuple[str, int, int] | None:
    """The GPU that a model runs on, as Triton names it; None where no kernel is compiled for it."""
    there = torch.version.cuda and model.device.type == "cuda"
    if not (there and importlib.util.find_spec("triton")):
        return None
    major, minor = torch.cuda.get_device_capability(model.device)
    return "cuda", 10 * major + minor, 32


class Compiling:
    """Processes that compile kernels, each kernel once."""

    def __init__(self) -> None:
        self.processes: list[subprocess.Popen[str]] = []
        self._begun = Kernels(("", 0, 0), 1, 1, 1, 1.0, "")

    def begin(self, policies: Sequence[Policy], geometry: Geometry, model: Any) -> None:
        """Compile what prompts and steps need under some policies, where the model is on a GPU.

        Args:
            policies: for the model's shape.
            geometry: of the model.
            model: a transformers causal language model, the same each time.
        """
        if (target := aimed_at(model)) is None:
            return
        config, dtype = model.config.get_text_config(), str(model.dtype).removeprefix("torch.")
        self.send(kernels_of(policies, geometry, config, dtype, target))

    def send(self, kernels: Kernels) -> None:
        """Share out what was not sent before."""
        fresh = kernels.beyond(self._begun)
        self._begun = replace(
            kernels,
            decode=self._begun.decode + fresh.decode,
            stored=self._begun.stored + fresh.stored,
            column_sums=self._begun.column_sums or fresh.column_sums,
        )
        for part in fresh.shares(min(PROCESSES, max(1, processors() // 2))):
            self.processes.append(_process(part))

    def wait(self, progress: Progress) -> None:
        """Until all have ended, or ``LONGEST_WAIT_S`` are over.

        Args:
            progress: told, once, of processes that have failed.
        """
        deadline = time.monotonic() + LONGEST_WAIT_S
        for process in self.processes:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                break
        ended = [process.poll() for process in self.processes]  # before others are made to end
        if codes := sorted({code for code in ended if code}):
            progress.note(
                "not all kernels could be compiled ahead, so that launching the rest takes longer "
                f"(exit codes {', '.join(map(str, codes))})"
            )
        self.end()

    def end(self) -> None:
        """End those that have not ended by themselves."""
        for process in self.processes:
            if process.poll() is None:
                process.kill()
                process.wait()


def _process(part: Kernels) -> subprocess.Popen[str]:
    """One that compiles a part."""
    process = subprocess.Popen(
        [sys.executable, "-m", "kvtune.runtime.compile_only"],
        stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    if process.stdin is not None:
        with suppress(OSError):  # of a process that has failed: kernels are compiled as ever
            process.stdin.write(part.text())
            process.stdin.close()
    return process
