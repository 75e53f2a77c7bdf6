"""llama.cpp's buffers: what it reserved and printed, by hand, and by the command."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib import resources

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtune.__main__ import main
from kvtune.benchmarks.llama_buffers import GOAL, Row, logged
from kvtune.cli.llama_args import read_llama_args
from kvtune.common.errors import KvtuneError
from kvtune.common.units import GIB, MIB
from kvtune.profiles.gpus import find_gpu
from kvtune.profiles.models import find_model
from kvtune.simulator.memory.llama_memory import MARGIN_BYTES, LlamaFlags, llama_memory

LLAMA, CARD = find_model("llama-3.1-8b"), find_gpu("4090")
_OFF = "--ctx-size 2048 --flash-attn off"  # 4 MiB of 164, inside the interval


@pytest.mark.parametrize("row", logged(), ids=lambda row: row.name)
def test_buffers_are_those_that_logs_print(row: Row) -> None:
    assert row.covered
    assert abs(row.off) <= (0.03 if _OFF in row.name else GOAL)


def test_what_llama_cpp_reserved_for_many_shapes_is_within_the_goal() -> None:
    file = resources.files("kvtune.benchmarks") / "results" / "llama-buffers-cpu.json"
    rows = json.loads(file.read_text("utf-8"))["reserved"]
    assert len(rows) == 105
    for row in rows:
        model, _, words = row["name"].partition(" ")
        flags, _ = read_llama_args(words)
        shape = find_model(model)
        inputs = 3 * 4 * flags.ubatch * shape.hidden_size
        found = (llama_memory(shape, CARD, "q4_0", flags).compute.value + inputs) / MIB
        assert found == pytest.approx(row["predicted"])
        assert found == pytest.approx(row["reserved"], rel=0.025)


def test_caches_are_counted_in_blocks_of_their_type() -> None:
    def cache(words: str) -> float:
        return llama_memory(LLAMA, CARD, "q4_0", read_llama_args(words)[0]).cache.value

    bf16 = 8192 * LLAMA.kv_bytes_per_token()
    assert cache("-c 8k") == bf16
    assert cache("-c 8k -ctk q8_0 -ctv q8_0") == bf16 * 34 / 64
    assert cache("-c 8k -ctk q8_0") == bf16 * (34 / 64 + 1) / 2
    assert cache("-c 8000") == bf16  # in whole steps of 256


def test_windows_keep_a_micro_batch_more_than_they_see() -> None:
    shape = find_model("gemma-3-12b")  # 8 of 48 layers keep everything; the others 1024 tokens
    found = llama_memory(shape, find_gpu("h200"), "bf16", LlamaFlags(ctx_size=32768))
    layer = 2 * 8 * 256 * 2
    assert found.cache.value == layer * (8 * 32768 + 40 * (1024 + 512))
    whole = llama_memory(shape, find_gpu("h200"), "bf16", LlamaFlags(32768, swa_full=True))
    assert whole.cache.value == layer * 48 * 32768


def test_recurrent_states_are_those_printed() -> None:
    """149.62 MiB a slot in a log of Qwen3.6-27B; 598.50 with three more snapshots."""
    shape = find_model("qwen3.6-27b")
    flags = LlamaFlags(ctx_size=32768)
    found = llama_memory(shape, find_gpu("h200"), "bf16", flags).cache
    states = 149.62 * MIB
    assert found.low <= 2048 * MIB + states <= found.high


@settings(deadline=None, max_examples=30)
@given(
    context=st.integers(1, 131072), ubatch=st.sampled_from([32, 512, 2048]),
    slots=st.integers(1, 8), flash=st.booleans(), unified=st.booleans(),
)  # fmt: skip
def test_more_of_anything_takes_no_less(
    context: int, ubatch: int, slots: int, flash: bool, unified: bool
) -> None:
    flags = LlamaFlags(context, ubatch, flash, slots=slots, unified=unified)
    least = llama_memory(LLAMA, CARD, "q4_0", flags)
    assert least.compute.low <= least.compute.value <= least.compute.high
    for more in (
        replace(flags, ctx_size=context + 4096),
        replace(flags, ubatch=2 * ubatch),
        replace(flags, flash=False),
        replace(flags, unified=True),
    ):
        assert llama_memory(LLAMA, CARD, "q4_0", more).compute.value >= least.compute.value


def test_the_longest_context_fits_and_the_next_does_not() -> None:
    flags = LlamaFlags()
    longest = int(llama_memory(LLAMA, CARD, "bf16", flags).tokens.value)
    assert 256 < longest < LLAMA.max_context

    def taken(tokens: int) -> float:
        found = llama_memory(LLAMA, CARD, "bf16", replace(flags, ctx_size=tokens))
        return found.total.value + MARGIN_BYTES

    assert taken(longest) <= CARD.visible_bytes < taken(longest + 256)


def test_builds_before_june_2026_reserve_all_logits() -> None:
    def found(build: str) -> float:
        return llama_memory(LLAMA, CARD, "q4_0", LlamaFlags(8192), build).compute.value

    assert found("b9000") == 4 * 512 * (LLAMA.vocab_size + LLAMA.hidden_size)
    assert found("b10809") < found("b9000") / 2
    between = llama_memory(LLAMA, CARD, "q4_0", LlamaFlags(8192), "b9400").compute
    assert between.low <= found("b10809")
    assert found("b9000") <= between.high


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("-ctk q9", "no type of llama.cpp's cache"), ("-c many", "no number of tokens"),
        ("-np 0", "no number of slots"), ("-fa perhaps", "none of on, off and auto"),
        ("'-c", "cannot be read"), ("-ctv q8_0 -fa off", "with flash attention only"),
    ],
)  # fmt: skip
def test_flags_that_make_no_sense_are_refused(words: str, said: str) -> None:
    with pytest.raises(KvtuneError, match=said):
        llama_memory(LLAMA, CARD, "q4_0", read_llama_args(words)[0])


def test_builds_and_models_that_are_not_known_are_refused() -> None:
    with pytest.raises(KvtuneError, match=r"no build of llama\.cpp"):
        llama_memory(LLAMA, CARD, "q4_0", version="0.19")
    with pytest.raises(KvtuneError, match="not modelled"):
        llama_memory(find_model("deepseek-v3"), CARD, "q4_0")


def test_the_command_says_what_llama_cpp_would_print(capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "estimate", "--model", "llama-8b", "--gpu", "4090", "--weights", "q4_0", "--context", "8k",
        "--stack", "llama-cpp", "--engine-args", "-c 32k -ctk q8_0 -ctv q8_0 --mlock",
    ]  # fmt: skip
    assert main([*words, "--json", "--quiet"]) == 0
    found = json.loads(capsys.readouterr().out)
    engine = found["engine"]
    assert engine["cache"]["value"] == 32768 * LLAMA.kv_bytes_per_token() * 34 / 64
    assert engine["total"]["value"] < 24 * GIB
    assert any("--mlock" in note for note in found["notes"])
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert "compute buffer size, of the GPU" in printed
    assert "longest context that fits" in printed
    assert main([*words[:-2], "--engine-version", "1.2"]) == 2
