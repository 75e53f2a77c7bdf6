"""OpenVINO GenAI: properties and scheduler settings, as JSON for ``ContinuousBatchingPipeline``."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from kvtune.policies.export.engine_wide import (
    CacheType,
    EngineWide,
    limits_of_types,
    one_of,
    positive,
    sixteen_bits,
)
from kvtune.policies.export.plan import Plan
from kvtune.policies.formats.openvino import PAGE_TOKENS, OpenVINO4, OpenVINO8, OpenVINOCodes

_SCALES = 8  # bytes of a 32-bit scale and a 32-bit zero point


def _paged(form: OpenVINOCodes) -> CacheType:
    """Codes with their scales: keys' are of a page's tokens in one channel, values' of a token."""
    bits = form.bits
    return CacheType(
        f"u{bits}",
        (bits, bits),
        lambda head_dim: 2 * head_dim * bits / 8 + _SCALES * (1 + head_dim / PAGE_TOKENS),
        f"int{bits}",
        f"asymmetric, 32-bit scales: keys' of a channel in {PAGE_TOKENS} tokens, values' of a "
        "token",
        own=form,
    )


_TYPES = (sixteen_bits("f16"), _paged(OpenVINO8()), _paged(OpenVINO4()))


@dataclass(frozen=True)
class OpenVINO(EngineWide):
    """One precision for the whole cache.

    Its own eviction (``CacheEvictionConfig``) scores by sums of attention over all layers, in
    blocks; no method of kvtune's does that, so that none is translated to it.
    """

    name = "openvino"
    stack = "OpenVINO GenAI"
    stack_version = "2026.4.1.0"
    source = "openvino_genai.SchedulerConfig, property KV_CACHE_PRECISION"
    proof = "ran"
    types = _TYPES
    limits = limits_of_types(_TYPES)
    page_tokens = PAGE_TOKENS
    why_dropped = "its eviction is by blocks of all layers, which no method of the plan's is"
    notes = (
        "properties go to the pipeline, scheduler fields to SchedulerConfig().",
        "keys' scales are by channel, its default on CPUs; the bytes are those that it allocates.",
        "prompts are read through what is stored of them, and generated tokens stored likewise.",
    )
    schema = {  # noqa: RUF012
        "properties": lambda value: (
            set(value) == {"KV_CACHE_PRECISION"}
            and value["KV_CACHE_PRECISION"] in {each.name for each in _TYPES}
        ),
        "scheduler": lambda value: (
            set(value) == {"num_kv_blocks", "max_num_seqs", "dynamic_split_fuse"}
            and positive(value["num_kv_blocks"])
            and positive(value["max_num_seqs"])
            and one_of(True, False)(value["dynamic_split_fuse"])
        ),
    }

    def config(self, plan: Plan, chosen: CacheType, batch: int) -> dict[str, Any]:
        """Two groups of settings."""
        return {
            "properties": {"KV_CACHE_PRECISION": chosen.name},
            "scheduler": {
                "num_kv_blocks": batch * -(-plan.sequence_tokens // PAGE_TOKENS),
                "max_num_seqs": batch,
                "dynamic_split_fuse": True,
            },
        }

    def file(self, config: dict[str, Any]) -> tuple[str, str]:
        """JSON; its header's lines begin with #, for a reader to drop."""
        return "openvino.json", json.dumps(config, indent=2) + "\n"
