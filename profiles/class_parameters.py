"""Parameters of a transformers model by what becomes of them, counted on the meta device."""

from __future__ import annotations

import re
from typing import Any

from kvtune.common.errors import KvtuneError
from kvtune.profiles.class_values import first_of
from kvtune.profiles.parameter_counts import Experts, ParameterCounts

_TOWER = re.compile(
    r"vision|visual|image|audio|speech|multi_modal|multimodal|mm_|projector|aligner|embed_tokens_"
    r"extend|vqmodel|\bmtp"
)
_QUERY_NORM = re.compile(r"\b(?:q|query)_(?:layer)?norm\.weight$")
_FEED_FORWARD_NAME = re.compile(r"mlp|ffn|feed_forward|shared_expert|\bfc\d|dense_h_to_4h|moe|ff\b")


def counts_of(model: Any, unknown: int) -> ParameterCounts:
    """Parameters by what becomes of them when weights are quantised, each counted once."""
    import torch

    looked_up = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    head_module = model.get_output_embeddings()
    head = id(head_module.weight) if head_module is not None else None
    groups = dict.fromkeys(ParameterCounts.__dataclass_fields__, 0) | {"unknown": unknown}
    for name, parameter in model.named_parameters():
        if _TOWER.search(name):
            group = "other"
        elif id(parameter) in looked_up:
            group = "embedding"
        elif id(parameter) == head:
            group = "head"
        else:
            group = _group(name, parameter)
        groups[group] += parameter.numel()
    corrections = (b for n, b in model.named_buffers() if n.endswith("e_score_correction_bias"))
    groups["small"] += sum(b.numel() for b in corrections)  # buffers that checkpoints hold
    return ParameterCounts(**groups)


def _group(name: str, parameter: Any) -> str:
    if parameter.dim() < 2 or "router" in name or name.endswith(("gate.weight", "conv1d.weight")):
        return "small"
    if ".experts." in name or name.endswith(("input_linear.weight", "output_linear.weight")):
        return "small" if "bias" in name else "experts"
    return "feed_forward" if _FEED_FORWARD_NAME.search(name) else "attention"


def query_norm_width(model: Any) -> int:
    """Numbers that are normalised together where queries are; 0 for a model that does not."""
    widths = (int(p.shape[-1]) for n, p in model.named_parameters() if _QUERY_NORM.search(n))
    return next(widths, 0)


def is_tied(model: Any) -> bool:
    """Whether the output matrix is the embedding."""
    head = model.get_output_embeddings()
    return head is not None and head.weight is model.get_input_embeddings().weight


def experts_of(model: Any, text: Any, file: str) -> Experts | None:
    """How many experts there are and how many a token visits; None for a dense model.

    Raises:
        KvtuneError: a token would visit more than there are.
    """
    names = [n for n, p in model.named_parameters() if _group(n, p) == "experts"]
    if not names:
        return None
    places = [text, getattr(text, "ffn_config", None)]  # DBRX keeps its numbers one level down
    count, active = (max(first_of(place, keys) for place in places) for keys in (_COUNT, _ACTIVE))
    if max(1, active) > max(1, count):
        raise KvtuneError(f"a token cannot visit {active} of {count} experts", where=file)
    return Experts(max(1, count), max(1, active), first_of(text, _WIDTH, 1))


_COUNT = (
    "num_local_experts", "n_routed_experts", "num_experts", "moe_num_experts", "num_moe_experts",
)  # fmt: skip
_ACTIVE = (
    "num_experts_per_tok", "moe_k", "top_k_experts", "num_experts_per_token", "moe_topk",
    "moe_top_k",
)  # fmt: skip
_WIDTH = ("moe_intermediate_size", "expert_ffn_hidden_size", "intermediate_size")
