"""What differs between releases of vLLM in how they count their memory.

The constants were fitted on what releases printed (``benchmarks/engine_tokens.py`` has each log's
source, and the logs that were left out of the fit).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from kvtune.common.errors import KvtuneError
from kvtune.common.units import GIB
from kvtune.common.vllm_releases import LOGGED

Range = tuple[float, float, float]  # value, low, high


@dataclass(frozen=True)
class Release:
    """What differs between releases of vLLM, from one of them on.

    Args:
        since: major and minor number of the first.
        utilization: the default of ``gpu_memory_utilization``.
        logit_bytes: that the sampler's peak takes of each logit.
        token_bytes: of each token of the profile run beside its hidden states.
        process_bytes: outside torch's allocator, of a process on one GPU.
        peers_bytes: more of it where several GPUs share the model.
        graphs_bytes: reserved for CUDA graphs before the cache is sized.
        keeps_expert_buffers: whether the buffers of routed experts outlast the forward pass.
        counts_requests: whether the tokens printed are those of whole requests at once.
        shares_states: whether recurrent states are kept for other requests unless flags say no.
        latent_step: tokens that kernels of latent attention read at once beside recurrent layers.
        padded_below: how many times the rarest kind of layer the commonest may be for groups as
            large as that (``BlockRules``).
    """

    since: tuple[int, int]
    utilization: float
    logit_bytes: Range
    token_bytes: float
    process_bytes: Range
    peers_bytes: Range
    graphs_bytes: Range = (0.0, 0.0, 0.0)
    keeps_expert_buffers: bool = False
    counts_requests: bool = False
    shares_states: bool = False
    latent_step: int = 64
    padded_below: float = 1.5


def _gib(value: float, low: float, high: float) -> Range:
    return value * GIB, low * GIB, high * GIB


_FROM_21 = Release(
    (0, 21), 0.92, (14.52, 6.5, 15.2), 5_700, _gib(0.25, 0.05, 0.46), _gib(1.85, 0.3, 2.1),
    graphs_bytes=_gib(0.6, 0.1, 1.3), keeps_expert_buffers=True, counts_requests=True,
)  # fmt: skip
RELEASES = (
    Release(
        (0, 9), 0.90, (37.75, 36.5, 39.5), 9_500, _gib(0.13, 0.02, 0.30), _gib(0.42, 0.1, 0.9),
        padded_below=1.0,
    ),
    Release(
        (0, 17), 0.90, (14.52, 14.0, 15.2), 5_700, _gib(0.13, 0.02, 0.30), _gib(0.42, 0.1, 2.0),
        keeps_expert_buffers=True, padded_below=1.25,
    ),
    Release(
        (0, 18), 0.90, (14.52, 14.0, 15.2), 5_700, _gib(0.25, 0.05, 0.46), _gib(1.85, 1.0, 2.1),
        keeps_expert_buffers=True,
    ),
    _FROM_21,
    replace(_FROM_21, since=(0, 26), shares_states=True),
    Release(
        (0, 27), 0.92, (7.0, 6.0, 15.2), 5_700, _gib(0.26, 0.05, 0.46), _gib(1.85, 0.3, 2.1),
        graphs_bytes=_gib(0.4, 0.1, 1.3), keeps_expert_buffers=True, counts_requests=True,
        shares_states=True, latent_step=128,
    ),
)  # fmt: skip
NEWEST = LOGGED


def find_release(version: str) -> Release:
    """The constants of a version such as ``0.19`` or ``v0.19.1``.

    Raises:
        KvtuneError: no version, or one before all that were measured.
    """
    match = re.match(r"v?(\d{1,3})\.(\d{1,3})(\.|$|[a-z+])", version.strip())
    oldest = "{}.{}".format(*RELEASES[0].since)
    if match is None:
        raise KvtuneError(
            f"{version[:20]!r} is no version of vLLM", hint=f"write for example {NEWEST}."
        )
    asked = int(match[1]), int(match[2])
    known = [release for release in RELEASES if release.since <= asked]
    if not known:
        raise KvtuneError(f"vLLM before {oldest} counts its memory in other ways")
    return known[-1]
