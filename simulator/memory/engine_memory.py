"""KV tokens that vLLM says fit: its share of a card less weights, profile run, process and graphs.

vLLM runs its longest step on made-up tokens before it allocates the cache, and gives the cache what
the peak of that run leaves of ``gpu_memory_utilization`` times the card's whole memory. The peak is
that of the sampler, which handles a row of logits for each of ``max_num_seqs`` sequences, or that
of the feed-forward blocks over ``max_num_batched_tokens`` tokens, whichever is larger.

Recurrent layers make attention blocks longer (``engine_blocks``), and weights are counted as they
are allocated (``engine_weights``); releases differ (``engine_releases``).
"""

from __future__ import annotations

from dataclasses import dataclass

from kvtune.common.estimate import Estimate, exact
from kvtune.common.units import GIB
from kvtune.profiles.gpus import GpuProfile
from kvtune.profiles.shape import ModelShape
from kvtune.profiles.split import split_over
from kvtune.simulator.memory.engine_blocks import BlockRules, CacheBlocks, cache_blocks
from kvtune.simulator.memory.engine_releases import NEWEST, Range, Release, find_release
from kvtune.simulator.memory.engine_weights import engine_weights
from kvtune.simulator.memory.peak import add
from kvtune.simulator.memory.weights import WeightFormat

_NONE: Range = (0.0, 0.0, 0.0)
_IMAGE_BYTES: Range = (10_000.0, 0.0, 30_000.0)
"""Pixels of the images that one token of an encoder's output stands for. Gemma 3 has 18,816,
Mistral Small 4,600; what was printed of four such models is within 0.15 GiB of this."""
_TOKENS_HELD = 3.55  # hidden states of all tokens at the widest moment of a layer, beside its MLP


@dataclass(frozen=True)
class EngineFlags:
    """Flags of ``vllm serve`` that decide how much cache there is; None for the engine's default.

    Args:
        gpu_memory_utilization: share of the card's whole memory.
        max_model_len: longest request, in tokens.
        max_num_seqs: sequences at once.
        max_num_batched_tokens: tokens of a step.
        kv_cache_bytes: of a cached number.
        block_size: tokens of a block.
        enforce_eager: whether no CUDA graphs are captured.
        kv_cache_memory_bytes: of the cache, in place of all that is left.
        shares_states: whether recurrent states are kept for prompts with the same beginning.
        state_element_bytes: of a number of a recurrent state.
        expert_parallel: whether each GPU has routed experts of its own, which take as much memory.
    """

    gpu_memory_utilization: float | None = None
    max_model_len: int | None = None
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    kv_cache_bytes: float = 2.0
    block_size: int = 16
    enforce_eager: bool = False
    kv_cache_memory_bytes: int | None = None
    shares_states: bool | None = None
    state_element_bytes: int | None = None
    expert_parallel: bool = False


@dataclass(frozen=True)
class EngineMemory:
    """What vLLM does with one GPU's memory. Estimates are in bytes, but for the tokens.

    Args:
        release: whose constants were taken, for example ``0.19``.
        device_bytes: what the card shows.
        limit_bytes: that vLLM may use of it.
        weights: one GPU's.
        activation: peak of the profile run beside the weights.
        process: outside torch's allocator.
        graphs: reserved for CUDA graphs.
        cache: left for the cache, as in "Available KV cache memory".
        tokens: as in "GPU KV cache size"; over all GPUs that share the model.
        block_size: tokens of a block.
        sequences: that are run at once, at most.
    """

    release: str
    device_bytes: int
    limit_bytes: int
    weights: Estimate
    activation: Estimate
    process: Estimate
    graphs: Estimate
    cache: Estimate
    tokens: Estimate
    block_size: int
    sequences: int


def engine_memory(
    shape: ModelShape,
    gpu: GpuProfile,
    weight_format: WeightFormat,
    flags: EngineFlags = EngineFlags(),
    version: str = NEWEST,
    gpus: int = 1,
) -> EngineMemory:
    """What ``vllm serve`` would print of its memory on one of the GPUs.

    Args:
        shape: the whole model.
        gpu: one of the cards.
        weight_format: as the engine holds the weights.
        flags: that were given.
        version: of vLLM.
        gpus: that share each layer.

    Raises:
        KvtuneError: a release or a kind of layer whose blocks are not modelled.
    """
    release = find_release(version)
    local = split_over(shape, gpus)
    blocks = cache_blocks(local, _rules(flags, release))
    share = release.utilization
    if flags.gpu_memory_utilization is not None:
        share = flags.gpu_memory_utilization
    limit = int(share * gpu.visible_bytes)
    parts = (
        engine_weights(shape, local, weight_format, gpu),
        _activation(shape, local, gpu, weight_format, flags, release),
        _process(release, gpus),
        _estimate(_NONE if flags.enforce_eager else release.graphs_bytes),
    )
    cache = _left(limit, parts, flags)
    return EngineMemory(
        version, gpu.visible_bytes, limit, *parts, cache,
        _tokens(shape, gpu, flags, release, blocks, cache), blocks.block_size,
        _batch(gpu, flags)[1],
    )  # fmt: skip


def _rules(flags: EngineFlags, release: Release) -> BlockRules:
    shares = release.shares_states if flags.shares_states is None else flags.shares_states
    return BlockRules(
        block_size=flags.block_size, element_bytes=flags.kv_cache_bytes,
        state_blocks=2 if shares else 1, state_element_bytes=flags.state_element_bytes,
        latent_step=release.latent_step, padded_below=release.padded_below,
    )  # fmt: skip


def default_batch(gpu: GpuProfile) -> tuple[int, int]:
    """Tokens of a step and sequences at once that ``vllm serve`` takes for a card."""
    large = gpu.visible_bytes >= 70 * GIB and "a100" not in gpu.name.lower()
    return (8192, 1024) if large else (2048, 256)


def _batch(gpu: GpuProfile, flags: EngineFlags) -> tuple[int, int]:
    tokens, sequences = default_batch(gpu)
    tokens = flags.max_num_batched_tokens or tokens
    return tokens, min(tokens, flags.max_num_seqs or sequences)


def _activation(
    shape: ModelShape,
    local: ModelShape,
    gpu: GpuProfile,
    weight_format: WeightFormat,
    flags: EngineFlags,
    release: Release,
) -> Estimate:
    """Peak of the profile run: the sampler's over all rows, or the feed-forward blocks'.

    What an encoder of images gave is held meanwhile: a step's tokens in all, with their pixels.
    """
    tokens, rows = _batch(gpu, flags)
    images = _IMAGE_BYTES if shape.parameter_counts().other else _NONE
    encoded = 2.0 * shape.hidden_size if any(images) else 0.0
    hidden = 2.0 * shape.hidden_size
    fixed = release.token_bytes * tokens
    experts = _expert_buffers(local, weight_format, tokens)
    kept = experts if release.keeps_expert_buffers else 0.0
    forward = tokens * _feed_forward_bytes(local) + experts

    def peak(logit_bytes: float, factor: float, image_bytes: float) -> float:
        sampler = logit_bytes * rows * shape.vocab_size + hidden * (tokens + rows) + kept
        held = fixed + tokens * (image_bytes + encoded)
        return held + max(sampler, factor * (forward + _TOKENS_HELD * hidden * tokens))

    value, low, high = map(peak, release.logit_bytes, (1.0, 0.85, 1.15), images)
    return _estimate((value, low, high))


def _feed_forward_bytes(local: ModelShape) -> float:
    """Bytes a token of the dense block's gate, up and product, in 16 bits; 0 without one."""
    if local.experts is None:
        return 2.0 * 3 * local.intermediate_size
    return 2.0 * 3 * local.experts.shared_size


def _expert_buffers(local: ModelShape, weight_format: WeightFormat, tokens: int) -> float:
    """Two buffers a visited expert, each as wide as the wider of what is kept there in turn.

    Experts in 4 bits are run by kernels that have none.
    """
    experts = local.experts
    narrow = weight_format == "mxfp4" or (local.stored is not None and local.stored.bits < 6)
    if experts is None or narrow:
        return 0.0
    width, hidden = experts.intermediate_size, local.hidden_size
    return 2.0 * tokens * experts.active * (max(width, hidden) + max(2 * width, hidden))


def _process(release: Release, gpus: int) -> Estimate:
    more = release.peers_bytes if gpus > 1 else _NONE
    value, low, high = (a + b for a, b in zip(release.process_bytes, more, strict=True))
    return _estimate((value, low, high))


def _estimate(ends: Range) -> Estimate:
    return Estimate(*ends, "B", "fitted")


def _left(limit: int, parts: tuple[Estimate, ...], flags: EngineFlags) -> Estimate:
    if flags.kv_cache_memory_bytes is not None:
        return exact(flags.kv_cache_memory_bytes, "B")
    used = add(*parts)
    value, low, high = (max(0.0, limit - end) for end in (used.value, used.high, used.low))
    return Estimate(value, low, high, "B", "fitted")


def _tokens(
    shape: ModelShape,
    gpu: GpuProfile,
    flags: EngineFlags,
    release: Release,
    blocks: CacheBlocks,
    cache: Estimate,
) -> Estimate:
    longest = flags.max_model_len or shape.max_context
    step = _batch(gpu, flags)[0]

    def printed(size: float) -> float:
        if release.counts_requests:
            return float(blocks.tokens_of_requests(size, longest, step))
        return float(blocks.tokens_of_blocks(size))

    value, low, high = (printed(end) for end in (cache.value, cache.low, cache.high))
    return Estimate(value, low, high, "tokens", cache.tier)
