"""What llama.cpp would print of its memory: read from the options, as a table and for JSON."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import RenderableType

    from kvtune.simulator.memory.llama_flags import LlamaFlags
    from kvtune.simulator.memory.llama_memory import LlamaMemory
    from kvtune.tuner.cases import Case
    from kvtune.tuner.estimating import Asked


@dataclass(frozen=True)
class LlamaEngine:
    """The engine that was asked for.

    Args:
        flags: of ``llama-server``.
        version: the build.
        notes: on flags that were not read.
    """

    flags: LlamaFlags
    version: str
    notes: tuple[str, ...]

    def slots(self, batch: int) -> int:
        """As many as sequences at once, unless ``-np`` says more.

        Raises:
            KvtuneError: ``-np`` says fewer.
        """
        from kvtune.common.errors import KvtuneError

        if 1 < self.flags.slots < batch:
            raise KvtuneError(
                f"--batch {batch} is more than the slots of -np {self.flags.slots}",
                hint=f"give -np {batch}, or a smaller --batch.",
            )
        return max(self.flags.slots, batch)

    def is_whole(self, layers: int) -> bool:
        """Whether all layers and their cache are on the GPU."""
        from kvtune.simulator.memory.llama_memory import read_build
        from kvtune.simulator.memory.llama_offload import offload_of

        flags, build = self.flags, read_build(self.version)
        return offload_of(layers, flags.gpu_layers, flags.cache_on_gpu, build).whole

    def memory(self, asked: Asked, case: Case) -> LlamaMemory:
        """Its buffers for a case: all slots have the case's context unless a flag says another.

        Raises:
            KvtuneError: several GPUs, or layers or flags that are not modelled.
        """
        from kvtune.common.errors import KvtuneError
        from kvtune.simulator.memory.llama_memory import llama_memory

        if asked.gpus > 1:
            raise KvtuneError("how llama.cpp splits a model over several GPUs is not modelled")
        slots = self.slots(case.batch)
        tokens = slots * (case.context_tokens + asked.generated_tokens)
        flags = replace(self.flags, slots=slots, ctx_size=self.flags.ctx_size or tokens)
        return llama_memory(
            asked.shape, case.card.gpu, case.weight_format(asked.shape), flags, self.version,
            case.card.memory_bytes,
        )  # fmt: skip


def read_llama(engine_args: str, version: str | None) -> LlamaEngine:
    """The engine of ``--stack llama-cpp``.

    Raises:
        KvtuneError: flags or a build that make no sense.
    """
    from kvtune.cli.llama_args import read_llama_args
    from kvtune.simulator.memory.llama_memory import NEWEST, read_build

    flags, notes = read_llama_args(engine_args)
    read_build(version or NEWEST)
    return LlamaEngine(flags, version or NEWEST, notes)


def llama_table(memory: LlamaMemory) -> RenderableType:
    """The buffers as llama.cpp's log has them."""
    from kvtune.cli.output import table
    from kvtune.common.units import GIB, MIB, format_tokens

    parts = (
        ("weights", memory.weights, "as in: model buffer size, of the GPU"),
        ("+ cache", memory.cache, "KV buffer size, and RS buffer size of recurrent layers"),
        ("+ graph", memory.compute, "compute buffer size, of the GPU"),
        ("+ process", memory.process, "driver and libraries"),
        ("= together", memory.total, f"of {memory.limit_bytes / GIB:.2f} GiB"),
        ("host weights", memory.host_weights, "model buffer size, of the host"),
        ("+ cache", memory.host_cache, "KV and RS buffer size, of the host"),
        ("+ graph", memory.host_compute, "compute buffer size, of the host"),
    )
    rows = [
        (name, f"{part.value / MIB:,.2f}", _interval(part.low, part.high), part.tier, words)
        for name, part, words in parts
    ]
    fits = memory.tokens
    ends = [format_tokens(int(end)).removesuffix(" tokens") for end in (fits.low, fits.high)]
    return table(
        f"Memory of llama.cpp {memory.version} at a context of {memory.ctx_size:,} tokens",
        ("", "MiB", "interval", "tier", ""),
        rows,
        left=(0, 2, 3, 4),
        caption=f"longest context that fits, 1 GiB left free: {int(fits.value):,} tokens "
        f"[{ends[0]}, {ends[1]}]",
    )


def _interval(low: float, high: float) -> str:
    from kvtune.common.units import MIB

    return "" if low == high else f"[{low / MIB:,.0f}, {high / MIB:,.0f}]"


def llama_json(memory: LlamaMemory) -> dict[str, Any]:
    """The form that goes into JSON."""
    plain = {key: getattr(memory, key) for key in ("device_bytes", "limit_bytes", "ctx_size")}
    figures = (
        "weights", "cache", "compute", "process", "total", "tokens",
        "host_weights", "host_cache", "host_compute",
    )  # fmt: skip
    found = {key: getattr(memory, key).as_dict() for key in figures}
    return {"release": memory.version, **plain, **found}
