"""What if: other contexts, batches, cards and limits; memory and time follow at once."""

from __future__ import annotations

from dataclasses import dataclass

from textual import on
from textual.app import ComposeResult
from textual.containers import Vertical
from textual.message import Message
from textual.widgets import Static

from kvtune.common.units import GIB, format_bytes
from kvtune.profiles.gpus import GpuProfile, list_gpus
from kvtune.tui.widgets.slider import Slider, Stop
from kvtune.tuner.explore.facts import Facts
from kvtune.tuner.explore.what_if import Setting

_LEAST_CONTEXT = 1024
_MEMORY_STOPS = 24
_MOST_SEQUENCES = 1024


class WhatIf(Vertical):
    """Five sliders, and a line that says what does not fit."""

    DEFAULT_CSS = """
    WhatIf { height: auto; }
    WhatIf #problem { height: auto; color: $text-error; display: none; }
    WhatIf.-problem #problem { display: block; }
    """

    @dataclass
    class Changed(Message):
        """Another setting is asked for."""

        setting: Setting

    def __init__(self, *, id: str | None = None) -> None:  # noqa: A002 - Textual's name
        super().__init__(id=id)
        self.context: Slider[int | None] = Slider("context", id="context")
        self.sequences: Slider[int | None] = Slider("batch", id="batch")
        self.gpu: Slider[GpuProfile] = Slider("GPU", id="gpu")
        self.memory: Slider[int] = Slider("memory", id="memory")
        self.weights: Slider[str] = Slider("weights", id="weights")
        self._asked: Setting | None = None  # the search's own
        self._share = 1.0  # of a card's memory that may be used

    def compose(self) -> ComposeResult:
        """One slider a line."""
        yield from (self.context, self.sequences, self.gpu, self.memory, self.weights)
        yield Static(id="problem", markup=False)

    def offer(self, facts: Facts) -> None:
        """Put every knob where the search stood."""
        setting = self._asked = Setting.asked(facts)
        self.context.offer(_contexts(facts), 0)
        self.sequences.offer(_batches(), 0)
        gpus = [Stop(gpu, gpu.name) for gpu in list_gpus()]
        self.gpu.offer(gpus, [stop.value.slug for stop in gpus].index(setting.gpu.slug))
        self._offer_memory(setting.gpu, setting.memory_bytes)
        formats = list(dict.fromkeys([facts.weights, "auto", "bf16", "fp8", "int8", "int4"]))
        self.weights.offer([Stop(name, name) for name in formats], 0)

    def _offer_memory(self, gpu: GpuProfile, wanted: int) -> None:
        """Even steps up to all that the card shows, and the limit that was asked for."""
        most = gpu.visible_bytes
        even = {most * step // _MEMORY_STOPS for step in range(1, _MEMORY_STOPS + 1)}
        sizes = sorted(even | {min(wanted, most)})
        stops = [Stop(size, f"{format_bytes(size)} of {most / GIB:.1f}") for size in sizes]
        self.memory.offer(stops, sizes.index(min(wanted, most)))
        self._share = self.memory.value / most

    @property
    def setting(self) -> Setting:
        """What the knobs stand on."""
        return Setting(
            gpu=self.gpu.value,
            memory_bytes=self.memory.value,
            weights=self.weights.value,
            context_tokens=self.context.value,
            sequences=self.sequences.value,
        )

    def tell(self, problem: str) -> None:
        """Say what does not fit; "" for nothing."""
        self.query_one("#problem", Static).update(problem)
        self.set_class(bool(problem), "-problem")

    @on(Slider.Moved)
    def pass_on(self, event: Slider.Moved) -> None:
        """Another card shows another memory; then ask for the setting."""
        event.stop()
        if event.slider.id == "gpu":
            self._follow(self.gpu.value)
        else:
            self._share = self.memory.value / self.gpu.value.visible_bytes
        self.post_message(self.Changed(self.setting))

    def _follow(self, gpu: GpuProfile) -> None:
        """Memory follows the card: the search's own limit on its own, else the same share."""
        if self._asked is not None and gpu == self._asked.gpu:
            self._offer_memory(gpu, self._asked.memory_bytes)
        else:
            self._offer_memory(gpu, int(self._share * gpu.visible_bytes))


def _contexts(facts: Facts) -> list[Stop[int | None]]:
    """Doublings up to what the model takes."""
    found: list[Stop[int | None]] = [Stop(None, "as searched")]
    tokens = _LEAST_CONTEXT
    while tokens <= facts.shape.max_context:
        found.append(Stop(tokens, f"{tokens // 1024}k tokens"))
        tokens *= 2
    return found


def _batches() -> list[Stop[int | None]]:
    """Powers of two and three halves of them."""
    numbers = sorted({n for k in range(11) for n in (2**k, 3 * 2**k // 2)})
    found: list[Stop[int | None]] = [Stop(None, "as searched")]
    return found + [Stop(n, f"{n} sequences") for n in numbers if 0 < n <= _MOST_SEQUENCES]
