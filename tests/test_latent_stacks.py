"""Latent attention and dealt experts by the kernels of serving stacks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvtune.common.errors import KvtuneError
from kvtune.profiles.models import find_model
from kvtune.profiles.parameter_counts import Experts
from kvtune.profiles.stack_kernels.latent import LatentCall
from kvtune.profiles.stack_kernels.tables import ServingTables
from kvtune.simulator.latency.serving_kernels import ServingModel
from kvtune.simulator.latency.stack_overheads import Overheads, small_kernels
from kvtune.tests.made_up_tables import RATE, latent_s, matrix_s, write_latent, write_systems

DEEPSEEK = replace(find_model("deepseek-v3"), experts=None, intermediate_size=2048)
NOTHING = Overheads()


@pytest.fixture(scope="module")
def systems(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """vLLM's tables have whole layers of attention, SGLang's the kernel; the rest is vLLM's."""
    folder = tmp_path_factory.mktemp("wheel") / "systems"
    write_systems(folder)
    write_latent(folder, "vllm", whole=True)
    write_latent(folder, "sglang", whole=False)
    for op in ("gemm", "comm"):
        place = folder / "data" / "h200_sxm" / op
        (place / "sglang").symlink_to(place / "vllm")
    return folder


def model(systems: Path, stack: Any = "sglang", gpus: int = 8, **changes: Any) -> ServingModel:
    tables = ServingTables(systems, "h200_sxm", stack)
    kept: dict[str, Any] = {"shape": DEEPSEEK, "kv_format": "bfloat16"} | changes
    form = "bfloat16"
    return ServingModel(
        tables, kept["shape"], gpus, form, form, kept["kv_format"], RATE, NOTHING,
        kept.get("groups", 1),
    )  # fmt: skip


@pytest.mark.parametrize(("form", "size"), [("bfloat16", 2.0), ("fp8", 1.0)])
def test_latents_are_read_as_the_formula_says(systems: Path, form: str, size: float) -> None:
    tables = ServingTables(systems, "h200_sxm", "sglang")
    batch, tokens = np.array([1.0, 8.0, 64.0]), np.array([500.0, 3000.0, 16000.0])
    found = tables.latent_attention(LatentCall("generation", 16, form, None), batch, tokens)
    wanted = [latent_s(b, n, 16, size) for b, n in zip(batch, tokens, strict=True)]
    assert found == pytest.approx(wanted, rel=0.03)


def test_every_gpu_reads_the_whole_latent_for_its_share_of_the_heads(systems: Path) -> None:
    one, eight = (
        float(model(systems, gpus=n).decode_attention(np.array(16.0), np.array(4096.0)))
        for n in (1, 8)
    )
    layers = DEEPSEEK.layers
    assert eight == pytest.approx(layers * latent_s(16, 4096, 16, 2.0), rel=0.03)
    assert one == pytest.approx(layers * latent_s(16, 4096, 128, 2.0), rel=0.03)


def test_a_layer_multiplies_into_both_latents_and_out_of_them(systems: Path) -> None:
    rows = np.array(16.0)
    latent = DEEPSEEK.latent
    assert latent is not None
    wide, heads = DEEPSEEK.hidden_size, 16
    parts = (
        matrix_s(16, 1536 + 512 + 64, wide), matrix_s(16, heads * (128 + 64), 1536),
        matrix_s(16, wide, heads * 128), 2 * (2e-6 + 16 * heads * 128 * 512 * 2 / 5e14),
    )  # fmt: skip
    assert float(model(systems).attention_matrices(rows)) == pytest.approx(sum(parts), rel=0.1)


def test_where_a_table_has_whole_layers_their_matrices_are_not_counted_twice(
    systems: Path,
) -> None:
    whole = model(systems, "vllm")
    assert float(whole.attention_matrices(np.array(16.0))) == 0.0
    with pytest.raises(KvtuneError, match="no measured latent attention over bfloat16 with matric"):
        whole.decode(1, 100)  # whole layers were measured with matrices in fp8 alone
    tables = ServingTables(systems, "h200_sxm", "vllm")
    shape = replace(DEEPSEEK, experts=None)
    in_fp8 = ServingModel(tables, shape, 8, "fp8", "fp8", "fp8", RATE, NOTHING)
    found = float(in_fp8.decode_attention(np.array(16.0), np.array(4096.0)))
    assert found == pytest.approx(shape.layers * (latent_s(16, 4096, 16, 1.0) + 50e-6), rel=0.03)
    assert small_kernels(shape, "fp8", whole_attention=True) < small_kernels(shape, "fp8")


def test_other_widths_and_layers_are_refused_with_a_way_out(systems: Path) -> None:
    assert DEEPSEEK.latent is not None
    narrower = replace(DEEPSEEK, latent=replace(DEEPSEEK.latent, kv_lora_rank=256))
    thinner = replace(DEEPSEEK, hidden_size=4096)
    for stack, shape in (("sglang", narrower), ("vllm", thinner)):
        with pytest.raises(KvtuneError, match="latent attention of widths") as caught:
            model(systems, stack, shape=shape)
        assert "kvtune's own model" in (caught.value.hint or "")
    model(systems, "sglang", shape=thinner)  # its kernel is the same
    with pytest.raises(KvtuneError, match="index keys"):
        model(systems, shape=find_model("deepseek-v3.2"))


def test_a_prompt_in_chunks_takes_at_least_as_long_and_a_prefix_is_not_read(
    systems: Path,
) -> None:
    reads = model(systems)
    whole = reads.prefill_in_chunks(4096)
    assert whole == pytest.approx(float(reads.prefill(4096)))
    assert reads.prefill_in_chunks(4096, chunk=512) > whole
    behind = reads.prefill_in_chunks(1024, prefix=3072)
    assert float(reads.prefill(1024)) < behind < whole


def test_experts_are_shared_or_dealt_to_gpus(systems: Path) -> None:
    mixture = replace(
        find_model("llama-8b"), hidden_size=2048, experts=Experts(128, 8, 768), kv_heads=8
    )
    seconds = {}
    for groups in (1, 2):
        each = model(systems, "vllm", gpus=2, shape=mixture, groups=groups)
        seconds[groups] = float(each._feed_forward(np.array(256.0)))
    # the table has them whole on two GPUs, which stands in for shares of each
    assert seconds[1] == seconds[2] == pytest.approx(32 * (0.05 * 128 + 0.1) * 1e-3)
    with pytest.raises(KvtuneError, match="cannot be dealt to 3 groups"):
        model(systems, "vllm", gpus=2, shape=mixture, groups=3)
    with pytest.raises(KvtuneError, match="no routed experts"):
        model(systems, "vllm", gpus=2, shape=find_model("llama-8b"), groups=2)
