"""The GPU's state while it is measured: clocks, watts, reasons for lower clocks, other users."""

from __future__ import annotations

import os
from typing import Any, NamedTuple, Protocol

# Names of NVML's bits; those that do not mean a slower GPU (idle, asked-for clocks) are left out.
_REASONS = {0x4: "power", 0x8: "hardware", 0x20: "thermal", 0x40: "thermal", 0x80: "power-brake"}
SERIOUS = ("hardware", "thermal", "power-brake")


class State(NamedTuple):
    """What the driver says of the GPU at one moment; zeros where nothing is known."""

    sm_mhz: int = 0
    memory_mhz: int = 0
    watts: float = 0.0
    throttle: str = ""
    celsius: int = 0


class Monitor(Protocol):
    """Reads a GPU's state."""

    def state(self) -> State:
        """The state of the GPU at this moment."""
        ...

    def used_bytes(self) -> int | None:
        """Device memory in use by everyone; None where it is not known."""
        ...

    def other_processes(self) -> int:
        """Processes on the GPU beside this one, 0 where that is not known."""
        ...

    def others_bytes(self) -> int:
        """Device memory of those processes, 0 where that is not known."""
        ...

    def driver(self) -> str:
        """Version of the driver, ``unknown`` where there is none to ask."""
        ...


class NoMonitor:
    """Where NVML is missing: nothing is known, and every row says so by zeros."""

    def state(self) -> State:
        """A state of zeros."""
        return State()

    def used_bytes(self) -> int | None:
        """None: what is used is not known."""
        return None

    def other_processes(self) -> int:
        """Zero: other processes are not known."""
        return 0

    def others_bytes(self) -> int:
        """Zero: what other processes use is not known."""
        return 0

    def driver(self) -> str:
        """A word for a driver that is not known."""
        return "unknown"


class NvmlMonitor:
    """Reads a GPU's state and the memory in use from NVIDIA's management library (NVML).

    Args:
        nvml: the module ``pynvml``, initialised.
        index: of the GPU.
    """

    def __init__(self, nvml: Any, index: int = 0) -> None:
        self._nvml = nvml
        self._handle = nvml.nvmlDeviceGetHandleByIndex(index)

    def state(self) -> State:
        """Clocks, watts and reasons; zero what this driver does not tell."""
        nvml, handle = self._nvml, self._handle
        asks_reasons = getattr(  # its newer name, then its older one
            nvml, "nvmlDeviceGetCurrentClocksEventReasons", None
        ) or getattr(nvml, "nvmlDeviceGetCurrentClocksThrottleReasons", lambda _: 0)
        bits = self._ask(asks_reasons, handle)
        return State(
            sm_mhz=self._ask(nvml.nvmlDeviceGetClockInfo, handle, nvml.NVML_CLOCK_SM),
            memory_mhz=self._ask(nvml.nvmlDeviceGetClockInfo, handle, nvml.NVML_CLOCK_MEM),
            watts=self._ask(nvml.nvmlDeviceGetPowerUsage, handle) / 1000,
            throttle=reasons(bits),
            celsius=self._ask(nvml.nvmlDeviceGetTemperature, handle, 0),
        )

    def used_bytes(self) -> int | None:
        """Device memory in use by everyone."""
        return int(self._nvml.nvmlDeviceGetMemoryInfo(self._handle).used)

    def other_processes(self) -> int:
        """Processes on the GPU beside this one."""
        return sum(process.pid != os.getpid() for process in self._processes())

    def others_bytes(self) -> int:
        """Of other processes, where this one is among those that the driver names.

        In a container the driver may number processes otherwise: who is who is then not known.
        """
        taken = {process.pid: process.usedGpuMemory or 0 for process in self._processes()}
        own = taken.pop(os.getpid(), None)
        return 0 if own is None else sum(taken.values())

    def _processes(self) -> list[Any]:
        try:
            return list(self._nvml.nvmlDeviceGetComputeRunningProcesses(self._handle))
        except self._nvml.NVMLError:
            return []

    def driver(self) -> str:
        """The version of the driver, for example ``580.159.04``."""
        version = self._nvml.nvmlSystemGetDriverVersion()
        return version.decode() if isinstance(version, bytes) else str(version)

    def _ask(self, question: Any, *arguments: Any) -> int:
        try:
            return int(question(*arguments))
        except self._nvml.NVMLError:
            return 0


def reasons(bits: int) -> str:
    """Reasons for lower clocks by name, each once, joined by ``+``."""
    return "+".join(dict.fromkeys(name for bit, name in _REASONS.items() if bits & bit))


def open_monitor(index: int = 0) -> Monitor:
    """NVML's, or one that knows nothing where NVML is missing.

    Args:
        index: of the GPU as torch counts them, those that this process sees.
    """
    try:
        import pynvml

        pynvml.nvmlInit()
        return NvmlMonitor(pynvml, _driver_index(index))
    except Exception:  # no library, no driver, no permission: measuring goes on without
        return NoMonitor()


def _driver_index(index: int) -> int:
    """The driver counts all GPUs of the machine."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    named = visible[index].strip() if index < len(visible) else ""
    return int(named) if named.isdecimal() else index
