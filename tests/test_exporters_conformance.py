"""What an exported file means on its stack is what its report says, for every method.

Files are read back here by rules of their own, written from the stacks' documentation.
"""

from __future__ import annotations

import configparser
import itertools
import json
import random
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml

from kvtune.common.errors import KvtuneError
from kvtune.common.estimate import Estimate
from kvtune.common.units import format_bytes
from kvtune.policies.allocators.adakv import AdaKV
from kvtune.policies.allocators.pyramid import Pyramid
from kvtune.policies.export import stored_alike
from kvtune.policies.export.compare import compared, notes_on_sequences
from kvtune.policies.export.contract import Export, exporters, find_exporter
from kvtune.policies.export.engine_wide import EngineWide, check
from kvtune.policies.export.exporters import ik_llama, llama_cpp
from kvtune.policies.export.vllm_config import sequence_bytes
from kvtune.policies.format import Format, formats
from kvtune.policies.formats.bf16 import Bf16
from kvtune.policies.formats.fp8 import Fp8
from kvtune.policies.formats.grouped import Int4, Int8
from kvtune.policies.formats.llama_cpp import Q4
from kvtune.policies.formats.token_head import Int4TokenHead
from kvtune.policies.method import Method, ScoredMethod, methods
from kvtune.policies.methods.expected_attention import ExpectedAttention
from kvtune.policies.methods.full import Full
from kvtune.policies.methods.kvzip import KVzip
from kvtune.policies.methods.quest import Quest
from kvtune.policies.methods.snapkv import SnapKV
from kvtune.policies.methods.streaming_llm import StreamingLLM
from kvtune.policies.option import ALL, Budget, Option
from kvtune.policies.parts import PartPlan
from kvtune.policies.policy import Policy
from kvtune.policies.policy_file.document import (
    ModelFacts,
    Pattern,
    PolicyDocument,
    Provenance,
    Quality,
    Serving,
    read_policy,
    write_policy,
)
from kvtune.policies.testing import Case, make_signals, variants
from kvtune.profiles.models import find_model
from kvtune.simulator.model_facts import model_facts
from kvtune.tests.tiers import all_hold

L, H, D, P, BUDGET = 4, 2, 64, 1024, 256
FACTS = ModelFacts("tiny", L, H, D)
LOSS = Estimate(0.0123, 0.01, 0.02, "nats/token", "table")
EVERY_METHOD: list[Method] = list(
    dict.fromkeys(
        [
            *(kind() for kind in methods().values()),
            *variants(StreamingLLM),
            *variants(SnapKV),
            ExpectedAttention(sinks=0),
            KVzip(sinks=0),
        ]
    )
)
FEW = Option(SnapKV(window=8, pooling="mean", group="pooled"), Budget(BUDGET), Int4(), Int4())
STORED: list[tuple[Format, Format]] = [
    (Bf16(), Bf16()), (Fp8(), Fp8()), (Int8(), Int8()), (Int4(), Int4()), (Int8(), Int4()),
]  # fmt: skip


def document(option: Option, **serving: Any) -> PolicyDocument:
    given = {"context_tokens": P, "batch": 3, "cache_bytes": 8 * 10**6} | serving
    policy = Policy.uniform(option, L, H, name="test")
    quality = Provenance(Quality("own trace", "", LOSS))
    return PolicyDocument(policy, FACTS, quality, Serving(**given))


@dataclass(frozen=True)
class Meaning:
    """What a stack does with the files: tokens of a prompt a layer keeps, bytes, sequences."""

    kept: str
    prompt_bytes: int
    sequences: int | None


def of_vllm(made: Export) -> Meaning:
    read = yaml.safe_load(made.files["vllm.yaml"])
    kinds = read.get("hf-overrides", {}).get("layer_types", ["full_attention"] * L)
    window = read.get("hf-overrides", {}).get("sliding_window", 0)
    bits = {"auto": (16, 0), "fp8": (8, 0), "int8_per_token_head": (8, 4),
            "int4_per_token_head": (4, 4), "fp8_per_token_head": (8, 4),
            "turboquant_k8v4": (16, 0)}  # fmt: skip  # it leaves two layers at each end alone
    code, scale = bits[read["kv-cache-dtype"]]
    total = 0
    for kind in kinds:
        chunk = read.get("max-num-batched-tokens", 0)
        held = P if kind == "full_attention" else min(P, window - 1 + chunk)
        total += held * H * 2 * (D * code // 8 + scale)
    sliding = set(kinds) == {"sliding_attention"}
    kept = f"window {window}" if sliding else "all"
    return Meaning(kept, total, read["max-num-seqs"])


def of_llama_cpp(made: Export) -> Meaning:
    parser = configparser.ConfigParser()
    parser.read_string(made.files["llama-preset.ini"].replace("version = 1", ""))
    read = parser["kvtune"]
    bits = {"f16": 16, "q8_0": 8.5, "q4_0": 4.5}
    assert read["cache-type-k"] == read["cache-type-v"]
    assert int(read["ctx-size"]) == P * int(read["parallel"])
    total = sum(L * H * P * D * bits[read[f"cache-type-{half}"]] / 8 for half in "kv")
    return Meaning("all", int(total), int(read["parallel"]))


def of_transformers(made: Export) -> Meaning:
    read = json.loads(made.files["kv_cache.json"])
    options = [read["options"][name] for row in read["heads"] for name in row]
    names = {option["method"]["name"] for option in options}
    budgets = {option["budget"] for option in options}
    kept = "all" if budgets == {None} else f"{names.pop()} {budgets.pop()}"
    total = 0
    for option in options:
        tokens = P if option["budget"] is None else option["budget"]
        for role in ("keys", "values"):
            form = formats()[option[role]["name"]]()
            total += form.bound(tokens, D, role)
    return Meaning(kept, total + 4 * L * H, None)


def whole_cache(code_bits: int, scale_bytes: float, sequences: int) -> Meaning:
    """All tokens in one type: so many bits an element, and bytes of scales a token and head."""
    return Meaning("all", int(L * H * P * (2 * D * code_bits / 8 + scale_bytes)), sequences)


def of_sglang(made: Export) -> Meaning:
    read = yaml.safe_load(made.files["sglang.yaml"])
    bits = {"auto": 16, "fp8_e4m3": 8}[read["kv-cache-dtype"]]
    assert read["max-total-tokens"] == read["max-running-requests"] * read["context-length"]
    return whole_cache(bits, 0, read["max-running-requests"])


def of_tensorrt_llm(made: Export) -> Meaning:
    read = yaml.safe_load(made.files["trtllm.yaml"])
    cache = read["kv_cache_config"]
    assert cache["max_tokens"] == read["max_batch_size"] * P
    return whole_cache({"auto": 16, "fp8": 8}[cache["dtype"]], 0, read["max_batch_size"])


def of_ollama(made: Export) -> Meaning:
    lines = [line for line in made.files["ollama.env"].splitlines() if line[0] != "#"]
    read = dict(line.split("=") for line in lines)
    code, scale = {"f16": (16, 0), "q8_0": (8, 2 * D / 16), "q4_0": (4, 2 * D / 16)}[
        read["OLLAMA_KV_CACHE_TYPE"]
    ]
    assert read["OLLAMA_FLASH_ATTENTION"] == ("0" if code == 16 else "1")
    return whole_cache(code, scale, int(read["OLLAMA_NUM_PARALLEL"]))


def flags_of(text: str) -> dict[str, str]:
    line = text.splitlines()[-1].split()
    return dict(zip(line[::2], line[1::2], strict=True))


def of_ik_llama(made: Export) -> Meaning:
    read = flags_of(made.files["ik-llama-server.txt"].replace("llama-server ", ""))
    bits = {"f16": 16, "q8_0": 8.5, "q4_0": 4.5}
    total = 0.0
    for half in "kv":
        kinds = [read[f"--cache-type-{half}"]] * L
        if "," in (first := read.get(f"--cache-type-{half}-first", "")):
            kind, count = first.split(",")
            kinds[: int(count)] = [kind] * int(count)
        if "," in (last := read.get(f"--cache-type-{half}-last", "")):
            kind, count = last.split(",")
            kinds[L - int(count) :] = [kind] * int(count)
        total += sum(H * P * D * bits[kind] / 8 for kind in kinds)
    assert int(read["--ctx-size"]) == P * int(read["--parallel"])
    return Meaning("all", int(total), int(read["--parallel"]))


def of_lmdeploy(made: Export) -> Meaning:
    read = flags_of(made.files["lmdeploy.txt"])
    code = {"0": 16, "8": 8, "4": 4}[read["--quant-policy"]]
    return whole_cache(code, 8 * (code < 16), int(read["--max-batch-size"]))


def of_openvino(made: Export) -> Meaning:
    text = "".join(line for line in made.files["openvino.json"].splitlines() if line[0] != "#")
    read = json.loads(text)
    code = {"f16": 16, "u8": 8, "u4": 4}[read["properties"]["KV_CACHE_PRECISION"]]
    assert read["scheduler"]["num_kv_blocks"] == read["scheduler"]["max_num_seqs"] * P // 32
    scales = 8 + 8 * D / 32  # of a token's values, of a page's keys by channel
    return whole_cache(code, scales * (code < 16), read["scheduler"]["max_num_seqs"])


def of_mlx(made: Export) -> Meaning:
    read = flags_of(made.files["mlx.txt"])
    code = int(read.get("--kv-bits", 16))
    return replace(whole_cache(code, 8 * (code < 16), 0), sequences=None)


def of_kvpress(made: Export) -> Meaning:
    read = json.loads(made.files["kvpress.json"])
    counts = {int(P * (1 - ratio)) for ratio in read["compression_ratios"]}
    assert len(counts) == 1
    assert len(read["compression_ratios"]) == L
    names = {"StreamingLLMPress": "newest", "SnapKVPress": "snapkv"}
    tokens = counts.pop()
    kept = "all" if tokens == P else f"{names[read['press']]} {tokens}"
    return Meaning(kept, L * H * tokens * 4 * D, None)


def of_lmcache(made: Export) -> Meaning:
    read = yaml.safe_load(made.files["lmcache.yaml"])
    assert P % read["chunk_size"] == 0
    each = L * H * P * 4 * D  # a sequence is as long as the plan's context here
    held = read["max_local_cpu_size"] * 1024**3
    return Meaning("all", each, int(held // each) if held % each < 2**20 else -1)


MEANING = {
    "vllm": of_vllm, "llama-cpp": of_llama_cpp, "transformers": of_transformers,
    "sglang": of_sglang, "tensorrt-llm": of_tensorrt_llm, "ollama": of_ollama,
    "lmdeploy": of_lmdeploy, "openvino": of_openvino, "mlx": of_mlx,
    "ik-llama": of_ik_llama, "kvpress": of_kvpress, "lmcache": of_lmcache,
}  # fmt: skip


def expected_tokens(stack: str, method: Method) -> str:
    """What may stand in a file for a method that keeps 256 of 1024 tokens."""
    if stack == "transformers":
        known = method.name in {"full", "streaming_llm", "snapkv", "h2o"}
        return f"{method.name} {BUDGET}" if known else "all"
    if stack == "kvpress":
        if method.shape in ("window", "sinks+window"):
            return f"newest {BUDGET}"
        known = isinstance(method, SnapKV) and method.recent is None
        return f"snapkv {BUDGET}" if known else "all"
    newest_only = method.name == "full" or method == replace_sinks(method)
    return f"window {BUDGET}" if stack == "vllm" and newest_only else "all"


def replace_sinks(method: Method) -> Method | None:
    return replace(method, sinks=0) if isinstance(method, StreamingLLM) else None


def test_every_exporter_is_read_back() -> None:
    assert set(MEANING) == set(exporters())


def cases() -> list[Any]:
    """Every method on every stack, in every format; one or the other where neither sees the other.

    Stacks with one type for the whole cache treat methods alike, and formats whatever the method.
    The whole product under -m full; else every method and every format once a stack.
    """
    simple = {name for name, kind in exporters().items() if issubclass(kind, EngineWide)}
    others = [method for method in EVERY_METHOD if method != SnapKV()]
    found = []
    for stack in sorted(MEANING):
        for stored in STORED:
            name = f"{stack}-{stored[0].name}-{stored[1].name}"
            found.append(pytest.param(stack, [SnapKV()], stored, id=name))
            marks = [] if stored == STORED[3] else [pytest.mark.full]
            if stack not in simple or not marks:
                found.append(pytest.param(stack, others, stored, id=f"{name}-all", marks=marks))
    return found


@pytest.mark.parametrize(("stack", "every", "stored"), cases())
def test_the_file_means_what_the_report_says(
    stack: str, every: list[Method], stored: tuple[Format, Format]
) -> None:
    all_hold((method.label, partial(check_file, stack, method, stored)) for method in every)


def check_file(stack: str, method: Method, stored: tuple[Format, Format]) -> None:
    made = find_exporter(stack)().export(document(Option(method, Budget(BUDGET), *stored)))
    meaning = MEANING[stack](made)
    assert meaning.kept == expected_tokens(stack, method)
    lines = {line.field: line for line in made.report}
    said = [line for field, line in lines.items() if field.startswith(f"method {method.name}")]
    if meaning.kept == "all":
        assert [line.status for line in said] == ["not expressible"]
        assert "all tokens stay" in said[0].detail
    elif meaning.kept.startswith("window"):
        assert lines["window"].status == "approximated"
        assert said == []
    else:
        assert [line.status for line in said] in (["kept"], ["approximated"])
    assert f"this export {format_bytes(meaning.prompt_bytes)}" in lines["cache bytes"].detail
    if meaning.sequences is not None:
        assert f"{meaning.sequences} at once" in lines["sequences"].detail
        assert meaning.sequences * meaning.prompt_bytes <= 8 * 10**6
    whole = made.wider or all(line.status == "kept" for line in made.report)
    for text in made.files.values():
        assert ("0.0123" in text) == whole
    assert ("0.0123" in made.quality) == whole


@pytest.mark.parametrize("method", EVERY_METHOD, ids=lambda method: method.label)
def test_the_declared_shape_is_what_a_method_keeps(method: Method) -> None:
    signals = make_signals(Case(60, 0, kv_heads=2, group=2))
    found = method.keep(signals, 20).tolist()
    patterns = [[*range(sinks), *range(40 + sinks, 60)] for sinks in range(21)]
    if method.shape == "scored":
        plain = method.plan(20, 60) == (PartPlan(20),)
        # What ranks tokens may rank them by place alone, and a window may have merged values.
        told = isinstance(method, ScoredMethod) or type(method).merge is not Method.merge
        assert told or not plain or found[0] not in patterns
        return
    sinks = getattr(method, "sinks", 0) if method.shape == "sinks+window" else 0
    assert found == [patterns[min(sinks, 20)]] * 2


@pytest.mark.parametrize(
    "method",
    [SnapKV(), SnapKV(group="pooled"), SnapKV(window=8, kernel=3, pooling="mean", recent=2),
     SnapKV(window=40), StreamingLLM(), StreamingLLM(sinks=0), Full(), methods()["h2o"]()],
    ids=lambda method: method.label,
)  # fmt: skip
@pytest.mark.parametrize("budget", [0, 1, 9, 30, 59])
def test_the_exported_module_keeps_the_tokens_of_the_method(method: Any, budget: int) -> None:
    from kvtune.policies.export import exported_cache

    signals = make_signals(Case(60, 0, kv_heads=2, group=4))
    made = find_exporter("transformers")().export(document(Option(method, Budget(budget))))
    option = json.loads(made.files["kv_cache.json"])["options"]["o0"]
    grouped = signals.queries.unflatten(0, (2, 4))
    theirs = [
        exported_cache.choose(option, grouped[head][None], signals.keys[head][None], signals.scale)
        for head in range(2)
    ]
    assert [rows[0].tolist() for rows in theirs] == method.keep(signals, budget).tolist()


def test_renumbered_positions_are_told_where_they_are_not_kept() -> None:
    method = StreamingLLM(positions="reindexed")
    made = find_exporter("transformers")().export(document(Option(method, Budget(BUDGET))))
    line = next(line for line in made.report if line.field.startswith("method"))
    assert line.status == "approximated"
    assert json.loads(made.files["kv_cache.json"])["options"]["o0"]["method"]["positions"] == "kept"


# Types by layer


def test_the_ends_of_ik_llama_are_the_smallest_that_give_every_layer_enough_bits() -> None:
    """Against every choice of three types and two counts."""
    kinds, draw = list(llama_cpp.CODES), random.Random(0)  # noqa: S311
    bits = llama_cpp.TYPES
    for _ in range(60):
        needed = draw.choices(kinds, weights=[5, 2, 1], k=draw.randint(1, 6))
        found = ik_llama.ends_for(needed).kinds(len(needed))
        assert all(bits[got] >= bits[want] for got, want in zip(found, needed, strict=True))
        choices = [
            [first] * n + [middle] * (len(needed) - n - m) + [last] * m
            for n in range(len(needed))
            for m in range(len(needed) - n)
            for first, middle, last in itertools.product(kinds, repeat=3)
        ]
        enough = [
            sum(bits[kind] for kind in each)
            for each in choices
            if all(bits[got] >= bits[want] for got, want in zip(each, needed, strict=True))
        ]
        assert sum(bits[kind] for kind in found) == min(enough)


def test_ik_llama_keeps_wide_layers_at_the_ends_and_says_so() -> None:
    wide, narrow = Option(Full(), ALL, Int8(), Int8()), Option(Full(), ALL, Int4(), Int4())
    rows = ((wide,) * H, (narrow,) * H, (narrow,) * H, (wide,) * H)
    plan = PolicyDocument(Policy("ends", rows), FACTS, serving=Serving(context_tokens=P, batch=1))
    made = find_exporter("ik-llama")().export(plan)
    read = flags_of(made.files["ik-llama-server.txt"].replace("llama-server ", ""))
    assert read["--cache-type-k"] == "q4_0"
    assert (read["--cache-type-v-first"], read["--cache-type-k-last"]) == ("q8_0,1", "q8_0,1")
    line = next(line for line in made.report if line.field.startswith("keys and values"))
    assert (line.status, line.detail.split(":")[0]) == ("approximated", "q8_0, q4_0, q8_0")
    swapped = replace(plan, policy=Policy("turns", (rows[1], rows[0]) * 2))
    within = find_exporter("ik-llama")().export(swapped)
    line = next(line for line in within.report if line.field.startswith("keys and values"))
    assert line.status == "not expressible"


@pytest.mark.parametrize(
    "wrong",
    [{"cache-type-k": "q9"}, {"cache-type-k-first": "q8_0"}, {"cache-type-v-last": "q8_0,0"},
     {"cache-type-k-first": "q8_0,2", "cache-type-k-last": "q8_0,2"}],
    ids=str,
)  # fmt: skip
def test_ik_llama_mirror_refuses_what_the_server_would(wrong: dict[str, Any]) -> None:
    ik_llama.check({"cache-type-k": "q4_0", "cache-type-k-first": "q8_0,1"}, L)
    with pytest.raises(ValueError, match=r"cache-type|layers"):
        ik_llama.check(wrong, L)


# Sequences, lengths, names, weights


def llama_plan(**serving: Any) -> PolicyDocument:
    """93 MiB a prompt of 8,192 tokens, 45 of which fit in 5.5 GiB with their answers."""
    given: dict[str, Any] = {
        "weights": "fp8", "context_tokens": 8192, "generated_tokens": 256, "batch": 45,
        "cache_bytes": int(5.5 * 2**30),
    }  # fmt: skip
    option = Option(SnapKV(), Budget(share=0.32), Int4(), Int4())
    facts = ModelFacts("llama-3.1-8b", 32, 8, 128, 131072, "meta-llama/Llama-3.1-8B")
    policy = Policy.uniform(option, 32, 8)
    return PolicyDocument(policy, facts, serving=Serving(**(given | serving)))


@pytest.mark.parametrize("stack", ["vllm", "llama-cpp"])
def test_sequences_are_those_that_fit_without_eviction(stack: str) -> None:
    """All tokens stay there, at 4 bits and scales: 270 to 300 MiB a sequence."""
    made = find_exporter(stack)().export(llama_plan())
    scale = {"vllm": 4 + 32 / 128, "llama-cpp": 4.5}[stack]  # bits an element
    each = 32 * 8 * 2 * 128 * 8448 * scale / 8
    most = int(5.5 * 2**30 // each)
    found = MEANING_OF_SEQUENCES[stack](made)
    assert most - 1 <= found <= most < 45
    line = next(line for line in made.report if line.field == "sequences")
    assert line.status == "approximated"
    assert f"{found} at once instead of 45" in line.detail


def parallel(made: Export) -> int:
    return int(made.files["llama-preset.ini"].split("parallel = ")[1].split()[0])


MEANING_OF_SEQUENCES = {
    "vllm": lambda made: yaml.safe_load(made.files["vllm.yaml"])["max-num-seqs"],
    "llama-cpp": parallel,
}


@pytest.mark.parametrize("stack", ["vllm", "llama-cpp"])
def test_more_sequences_than_fit_are_refused(stack: str) -> None:
    exporter = find_exporter(stack)()
    with pytest.raises(KvtuneError, match=f"30 sequences do not fit under {exporter.stack}") as no:
        exporter.export(llama_plan(), batch=30)
    assert "--batch " in (no.value.hint or "")
    with pytest.raises(KvtuneError, match="not one sequence fits"):
        exporter.export(llama_plan(cache_bytes=10**8))


@pytest.mark.parametrize("stack", ["vllm", "llama-cpp"])
def test_without_a_memory_limit_the_plans_own_bytes_are_what_is_known(stack: str) -> None:
    exporter = find_exporter(stack)()
    made = exporter.export(llama_plan(cache_bytes=None))
    planned = 45 * (llama_plan().policy.footprint(8192, 128) + 256 * 131072)  # type: ignore[union-attr]
    each = 32 * 8 * 2 * 128 * 8448 * (4.5 / 8)
    assert MEANING_OF_SEQUENCES[stack](made) <= planned / each * 1.06
    asked = exporter.export(llama_plan(cache_bytes=None), batch=50)
    line = next(line for line in asked.report if line.field == "sequences")
    assert (line.status, "check that they fit" in line.detail) == ("approximated", True)


@pytest.mark.parametrize(
    ("more", "concurrency"),
    [
        ({"kv-cache-dtype": "auto"}, 5.69),
        ({"kv-cache-dtype": "auto", "sliding": 20}, 14.66),
        ({"kv-cache-dtype": "fp8", "sliding": 20}, 29.32),
        ({"kv-cache-dtype": "auto", "sliding": 30}, 69.33),
    ],
)
def test_a_sequence_takes_what_vllm_said_that_it_takes(
    more: dict[str, Any], concurrency: float
) -> None:
    """The log of vLLM 0.32: 1 GiB, SmolLM2-135M, 8,192 tokens, windows of 128, chunks of 512."""
    sliding = more.pop("sliding", 0)
    config = {"max-model-len": 8192, **more}
    if sliding:
        kinds = ["full_attention"] * (30 - sliding) + ["sliding_attention"] * sliding
        config |= {"max-num-batched-tokens": 512}
        config |= {"hf-overrides": {"sliding_window": 128, "layer_types": kinds}}
    found = 2**30 / sequence_bytes(config, 3, 64, 30)
    assert found == pytest.approx(concurrency, rel=0.002)


@pytest.mark.parametrize(
    ("form", "keys", "values"), [(Int8(), 40 * 64, 32 * 72), (Int4(), 48 * 32, 32 * 40)]
)
def test_openvinos_bytes_are_those_of_its_compiled_model(
    form: Format, keys: int, values: int
) -> None:
    """Bytes of a head's page of 32 tokens, of SmolLM2-135M's shape as OpenVINO 2026.4.1 has it."""
    made = find_exporter("openvino")().export(document(Option(keys=form, values=form)))
    assert made.prompt_bytes == L * H * (P // 32) * (keys + values)


def test_no_stack_is_told_of_more_tokens_than_the_model_takes() -> None:
    at_the_end = llama_plan(context_tokens=131072, batch=1, cache_bytes=10**11)
    made = find_exporter("vllm")().export(at_the_end)
    assert yaml.safe_load(made.files["vllm.yaml"])["max-model-len"] == 131072
    line = next(line for line in made.report if line.field == "generated tokens")
    assert (line.status, line.detail.split(":")[0]) == ("approximated", "0 tokens instead of 256")
    preset = find_exporter("llama-cpp")().export(at_the_end).files["llama-preset.ini"]
    assert "ctx-size = 131072\n" in preset
    with pytest.raises(KvtuneError, match="takes 131072 tokens, a prompt of 131073 is longer"):
        find_exporter("vllm")().export(at_the_end, context_tokens=131073)


def test_a_model_is_named_as_the_stack_knows_it_or_not_at_all() -> None:
    exporter = find_exporter("vllm")()
    plan = llama_plan()
    named = yaml.safe_load(exporter.export(plan).files["vllm.yaml"])
    assert (named["model"], named["quantization"]) == ("meta-llama/Llama-3.1-8B", "fp8")
    given = yaml.safe_load(exporter.export(plan, model="./mine").files["vllm.yaml"])
    assert given["model"] == "./mine"
    unknown = replace(plan, model=ModelFacts("mine", 32, 8, 128))
    text = exporter.export(unknown).files["vllm.yaml"]
    assert "model" not in yaml.safe_load(text)
    assert "# model is left out" in text
    gguf = find_exporter("llama-cpp")().export(plan).files["llama-preset.ini"]
    assert "\nmodel = " not in gguf
    assert "; model is left out" in gguf


def test_weights_that_are_not_made_when_loading_have_to_be_in_the_checkpoint() -> None:
    exporter = find_exporter("vllm")()
    text = exporter.export(llama_plan(weights="int4")).files["vllm.yaml"]
    assert not {"model", "quantization"} & set(yaml.safe_load(text))
    assert "# the plan assumed int4 weights: name a checkpoint that holds them." in text
    given = exporter.export(llama_plan(weights="int4"), model="./int4")
    assert yaml.safe_load(given.files["vllm.yaml"])["model"] == "./int4"
    plain = yaml.safe_load(exporter.export(llama_plan(weights="bf16")).files["vllm.yaml"])
    assert "quantization" not in plain


def test_memory_for_the_cache_is_the_plans() -> None:
    read = yaml.safe_load(find_exporter("vllm")().export(llama_plan()).files["vllm.yaml"])
    assert read["kv-cache-memory-bytes"] == int(5.5 * 2**30)


def test_a_budget_planned_by_an_allocator_is_the_window_of_its_layer() -> None:
    option = Option(Full(), Budget(256))
    policy = Policy.uniform(option, L, H, allocator=Pyramid(beta=2))
    made = find_exporter("vllm")().export(
        PolicyDocument(policy, FACTS, serving=Serving(context_tokens=P, batch=1))
    )
    read = yaml.safe_load(made.files["vllm.yaml"])
    assert read["hf-overrides"]["sliding_window"] == policy.budgets(P).max() == 384
    later = Policy.uniform(Option(SnapKV(), Budget(256)), L, H, allocator=AdaKV())
    made = find_exporter("vllm")().export(PolicyDocument(later, FACTS), context_tokens=P)
    found = {line.field: line.status for line in made.report}
    assert found["allocator adakv"] == "not expressible"


def test_facts_of_known_models_are_written_and_read() -> None:
    facts = model_facts(find_model("smollm2-135m"))
    assert (facts.hub, facts.max_context) == ("HuggingFaceTB/SmolLM2-135M-Instruct", 8192)
    serving = Serving(context_tokens=77, cache_bytes=10**9)
    what = PolicyDocument(Pattern(Option()), facts, serving=serving)
    assert read_policy(write_policy(what)) == what


# All stacks side by side


def test_every_stack_stands_beside_the_plan_and_the_uncompressed_cache() -> None:
    rows = {row.name: row for row in compared(llama_plan())}
    assert list(rows)[:2] == ["uncompressed", "kvtune"]
    assert set(rows) == {"uncompressed", "kvtune", *exporters()}
    full = 32 * 8 * 2 * 2 * 128 * 8192
    assert rows["uncompressed"].prompt_bytes == full
    plan = llama_plan().policy
    assert rows["kvtune"].prompt_bytes == plan.footprint(8192, 128)  # type: ignore[union-attr]
    assert rows["kvtune"].sequences == 45
    for name in exporters():
        made = find_exporter(name)().export(llama_plan())
        assert (rows[name].prompt_bytes, rows[name].sequences) == (
            made.prompt_bytes,
            made.sequences,
        )
        if made.sequences is not None:
            assert made.sequences * made.prompt_bytes <= 5.5 * 2**30


def test_a_loss_stands_only_beside_stacks_that_keep_the_plan() -> None:
    rows = {row.name: row for row in compared(document(Option()))}
    assert rows["kvtune"].loss == "0.0123 [0.01, 0.02] table"
    assert {row.loss for name, row in rows.items() if name != "kvtune"} == {"0"}, "16 bits"
    rows = {row.name: row for row in compared(document(Option(SnapKV(), Budget(BUDGET))))}
    assert rows["kvtune"].loss == rows["transformers"].loss == "0.0123 [0.01, 0.02] table"
    rows = {row.name: row for row in compared(document(FEW))}
    for name in set(exporters()) - {"transformers", "kvpress", "lmcache"}:
        assert rows[name].loss == "not the plan's"
    assert rows["lmcache"].loss == "0", "whole prompts in 16 bits"


def test_a_window_that_holds_as_many_bytes_as_the_whole_prompt_is_not_called_lossless() -> None:
    """It slides all the same; vLLM holds a chunk of 512 tokens beside it."""
    rows = {row.name: row for row in compared(document(Option(Full(), Budget(P - 100))))}
    assert rows["vllm"].prompt_bytes == rows["uncompressed"].prompt_bytes
    assert rows["vllm"].loss == "not the plan's"
    assert rows["llama-cpp"].loss == "0", "all tokens stay"


@pytest.mark.parametrize("option", [Option(), Option(Quest(block=64), Budget(64)), FEW])
def test_whole_prompts_are_what_runs_and_not_how_many_bytes_they_are(option: Option) -> None:
    """However a stack counts them, in blocks or with lengths beside."""
    size = 2 * 2 * L * H * D * P
    for name in exporters():
        made = find_exporter(name)().export(document(option))
        assert made.whole == (made.prompt_bytes in (size, size + 4 * L * H))


def test_what_a_stack_loses_is_predicted_once_for_all_files() -> None:
    asked: list[str] = []

    def predict(stack: str, *_: object) -> Estimate | None:
        asked.append(stack)
        return LOSS

    made = find_exporter("llama-cpp")().export(document(FEW), predict=predict)
    assert len(made.files) == 3
    assert asked == ["llama-cpp"]


@pytest.mark.parametrize("stack", ["llama-cpp", "ollama", "ik-llama", "mlx"])
def test_heads_that_a_stack_cannot_quantise_are_stored_in_more_bits(stack: str) -> None:
    facts = replace(FACTS, head_dim=80)
    plan = replace(document(Option(keys=Int4(), values=Int4())), model=facts)
    made = find_exporter(stack)().export(plan)
    assert made.wider
    assert "loses no more than 0.0123" in made.files["REPORT.txt"]


@pytest.mark.parametrize("stack", ["llama-cpp", "openvino"])
def test_a_narrower_type_than_some_heads_have_is_not_more_bits(stack: str) -> None:
    rows = ((Option(keys=Int4(), values=Int4()),) * H,) * (L - 1) + ((Option(),) * H,)
    plan = replace(document(Option()), policy=Policy("mostly narrow", rows))
    assert not find_exporter(stack)().export(plan).wider


def test_a_stack_that_stores_what_a_plan_keeps_in_more_bits_loses_no_more() -> None:
    made = find_exporter("kvpress")().export(document(FEW))
    assert made.wider
    assert not made.keeps_loss
    assert "loses no more than 0.0123" in made.files["REPORT.txt"]
    rows = {row.name: row for row in compared(document(FEW))}
    assert rows["kvpress"].loss == "at most 0.0123 [0.01, 0.02] table"


def test_what_runs_where_a_plan_is_not_kept_may_be_predicted() -> None:
    def predict(stack: str, runs: Policy, facts: ModelFacts) -> Estimate | None:
        assert (runs.layers, runs.kv_heads, facts) == (L, H, FACTS)
        return replace(LOSS, value=0.5, high=1.0)

    rows = {row.name: row for row in compared(document(FEW), predict=predict)}
    known = {name for name, row in rows.items() if row.loss.startswith("0.5")}
    assert known == {"vllm", "llama-cpp", "openvino"}


@pytest.mark.parametrize("stack", ["vllm", "llama-cpp", "openvino"])
@pytest.mark.parametrize("form", [Int4(), Int8(), Bf16()])
def test_what_runs_there_takes_the_bytes_that_the_export_says(stack: str, form: Format) -> None:
    found: list[Policy] = []

    def predict(_: str, runs: Policy, __: ModelFacts) -> Estimate | None:
        found.append(runs)
        return None

    plan = document(Option(SnapKV(), Budget(64), form, form))
    made = find_exporter(stack)().export(plan, predict=predict)
    lengths = 4 * L * H
    assert found[0].footprint(P, D) - lengths == made.prompt_bytes


@pytest.mark.parametrize(
    ("option", "plugin"),
    [(Option(SnapKV(), Budget(BUDGET)), True), (Option(Quest(block=64), Budget(64)), False)],
)
def test_the_plugin_is_named_only_for_what_it_serves(option: Option, plugin: bool) -> None:
    rows = {row.name: row for row in compared(document(option))}
    assert ("plugin" in rows["kvtune"].proof) == plugin


@pytest.mark.parametrize("context", [4096, 32768])
def test_nobody_says_how_many_prompts_of_another_length_fit(context: int) -> None:
    """What works on a prompt takes memory too, more the longer it is: the room is another."""
    plan = llama_plan()
    rows = compared(plan, context_tokens=context)
    assert {row.sequences for row in rows} == {None}
    (note,) = notes_on_sequences(plan, rows, context)
    assert "8 192" in note
    assert f"--context {context}" in note
    made = find_exporter("vllm")().export(plan, context_tokens=context)
    assert "kv-cache-memory-bytes" not in yaml.safe_load(made.files["vllm.yaml"])
    own = compared(plan, context_tokens=8192)
    assert own == compared(plan)
    assert notes_on_sequences(plan, own, 8192) == ()


def test_an_export_for_longer_prompts_says_that_their_room_is_not_known() -> None:
    made = find_exporter("llama-cpp")().export(llama_plan(), context_tokens=32768)
    line = next(line for line in made.report if line.field == "sequences")
    assert line.status == "approximated"
    assert line.detail.startswith("1 at once")
    assert "known beside prompts of 8192 tokens alone" in line.detail


def test_a_plan_for_fewer_than_fit_says_for_how_many() -> None:
    plan = llama_plan(batch=9)
    rows = compared(plan)
    assert {row.name: row.sequences for row in rows}["kvtune"] == 45
    assert notes_on_sequences(plan, rows) == ("planned for 9 at once.",)
    assert notes_on_sequences(llama_plan(), rows) == ()


def test_a_stack_that_cannot_hold_one_sequence_says_so() -> None:
    rows = {row.name: row for row in compared(llama_plan(cache_bytes=10**8))}
    assert rows["vllm"].prompt_bytes is None
    assert "not one sequence fits" in rows["vllm"].loss


@pytest.mark.parametrize(
    ("stack", "wrong"),
    [
        ("sglang", {"model_path": "x"}),
        ("sglang", {"kv-cache-dtype": "int8"}),
        ("sglang", {"max-running-requests": True}),
        ("tensorrt-llm", {"max_batch_size": 0}),
        ("tensorrt-llm", {"kv_cache_config": {"dtype": "int4"}}),
        ("lmdeploy", {"cache-block-seq-len": 0}),
        ("lmdeploy", {"quant-policy": 42}),
        ("ollama", {"OLLAMA_KV_CACHE_TYPE": "q5_0"}),
        ("openvino", {"properties": {"KV_CACHE_PRECISION": "i2"}}),
        ("mlx", {"kv-bits": 5}),
        ("lmcache", {"max_local_cpu_size": 0.0}),
        ("lmcache", {"remote_serde": "cachegen"}),
    ],
)
def test_what_a_stack_refuses_or_takes_silently_is_refused_here(
    stack: str, wrong: dict[str, Any]
) -> None:
    kind = exporters()[stack]
    assert issubclass(kind, EngineWide)
    with pytest.raises(ValueError, match=r"no settings|cannot be"):
        check(wrong, kind.schema, kind.stack)


@pytest.mark.parametrize(
    ("stack", "form"), [("vllm", Int4TokenHead()), ("llama-cpp", Q4(rotation="hadamard"))]
)
def test_a_stack_that_stores_answers_likewise_loses_more_than_the_plan(
    stack: str, form: Format
) -> None:
    plan = document(Option(keys=form, values=form))
    made = find_exporter(stack)().export(plan)
    least, mean, most = stored_alike.RATIOS[form.label]
    assert made.keeps_loss
    assert made.loss is not None
    assert (made.loss.low, made.loss.value, made.loss.high) == pytest.approx(
        (0.01 * least, 0.0123 * mean, 0.02 * most)
    )
    assert made.loss.tier == "transferred"
    report = made.files["REPORT.txt"]
    assert "0.0123 [0.01, 0.02] table is what the plan loses by its prompt" in report
    assert {row.name: row.loss for row in compared(plan)}[stack] in report


def test_a_plan_in_16_bits_loses_no_more_anywhere() -> None:
    for name in exporters():
        made = find_exporter(name)().export(document(Option()))
        assert made.loss is not None
        assert (made.loss.value, made.loss.tier) == (0.0123, "table")


def test_ratios_are_those_that_were_measured() -> None:
    path = Path(__file__).parents[1] / "benchmarks" / "results" / "stored-answers-cpu.json"
    found = json.loads(path.read_text("utf-8"))
    assert set(found) == set(stored_alike.RATIOS)
    for label, kinds in found.items():
        both = {way: [each[way] for each in kinds.values()] for way in ("prompt", "everything")}
        each = [there / plan for plan, there in zip(*both.values(), strict=True)]
        measured = min(each), sum(both["everything"]) / sum(both["prompt"]), max(each)
        assert stored_alike.RATIOS[label] == pytest.approx(measured, rel=0.01)
        assert len(kinds) == 3
