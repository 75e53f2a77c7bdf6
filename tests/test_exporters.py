"""Exporters: honest reports, refusals, and the files themselves against golden ones."""

from __future__ import annotations

import configparser
import importlib.util
import json
import re
import shlex
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtune.common.errors import KvtuneError
from kvtune.policies.allocators.adakv import AdaKV
from kvtune.policies.allocators.pyramid import Pyramid
from kvtune.policies.export.contract import Export, exporters, find_exporter, write_export
from kvtune.policies.export.exporters import llama_cpp
from kvtune.policies.export.vllm_config import check as check_vllm
from kvtune.policies.format import formats
from kvtune.policies.formats.bf16 import Bf16
from kvtune.policies.formats.fp8 import Fp8
from kvtune.policies.formats.grouped import Int2, Int4, Int8
from kvtune.policies.formats.llama_cpp import Q4, Q8
from kvtune.policies.formats.token_head import Fp8TokenHead, Int4TokenHead, Int8TokenHead
from kvtune.policies.method import methods
from kvtune.policies.methods.full import Full
from kvtune.policies.methods.h2o import H2O
from kvtune.policies.methods.snapkv import SnapKV
from kvtune.policies.methods.streaming_llm import StreamingLLM
from kvtune.policies.option import ALL, Budget, Option
from kvtune.policies.policy import Policy
from kvtune.policies.policy_file.document import (
    ModelFacts,
    Pattern,
    PolicyDocument,
    Provenance,
    Quality,
    Serving,
)

GOLDEN = Path(__file__).parent / "golden"
FACTS = ModelFacts("tiny", 4, 2, 64)
NAMES = sorted(exporters())


def golden_module() -> ModuleType:
    spec = importlib.util.spec_from_file_location("remake_exports", GOLDEN / "remake_exports.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def document(*rows: tuple[Option, ...], **more: Any) -> PolicyDocument:
    policy = Policy("test", rows)
    return PolicyDocument(policy, FACTS, serving=Serving(context_tokens=1024, batch=2), **more)


def uniform(option: Option) -> PolicyDocument:
    return document(*[(option, option)] * 4)


def export(name: str, what: PolicyDocument, **more: Any) -> Export:
    return find_exporter(name)().export(what, model="models/tiny", **more)


def statuses(made: Export) -> dict[str, str]:
    return {line.field: line.status for line in made.report}


def vllm_config(made: Export) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load(made.files["vllm.yaml"])
    return loaded


def preset(made: Export) -> dict[str, str]:
    parser = configparser.ConfigParser()
    parser.read_string(made.files["llama-preset.ini"].replace("version = 1", ""))
    return dict(parser["kvtune"])


STAND_IN = Provenance(Quality("stand-in", "smollm2-135m"))


# Every exporter


def test_exporters_are_found() -> None:
    assert {"transformers", "vllm", "llama-cpp"} <= set(NAMES)
    with pytest.raises(KvtuneError, match="unknown exporter 'vlm'"):
        find_exporter("vlm")


@pytest.mark.parametrize("name", NAMES)
def test_files_are_the_golden_ones(name: str) -> None:
    golden = golden_module()
    made = golden.golden_files(golden.exports()[name])
    kept = {path.name: path.read_text() for path in (GOLDEN / "exports" / name).iterdir()}
    assert made == kept, "if this is meant: python tests/golden/remake_exports.py"


@pytest.mark.parametrize("name", NAMES)
def test_stand_in_is_refused_unless_allowed_and_then_said_in_every_file(name: str) -> None:
    what = replace(uniform(Option()), provenance=STAND_IN)
    with pytest.raises(KvtuneError, match="stand-in"):
        export(name, what)
    for file, text in export(name, what, allow_stand_in=True).files.items():
        assert "quality: stand-in (smollm2-135m)" in text, file


@pytest.mark.parametrize("name", NAMES)
def test_every_file_names_stack_version_and_proof(name: str) -> None:
    kind = exporters()[name]
    for file, text in export(name, uniform(Option())).files.items():
        assert f"{kind.stack} {kind.stack_version}" in text, file
        assert f"proof: {kind.proof}" in text, file


@pytest.mark.parametrize("name", NAMES)
def test_the_full_cache_is_kept_everywhere(name: str) -> None:
    made = export(name, uniform(Option()), strict=True)
    assert {line.status for line in made.report} == {"kept"}


@pytest.mark.parametrize("name", ["vllm", "llama-cpp"])
def test_strict_refuses_what_is_lost(name: str) -> None:
    what = uniform(Option(SnapKV(), Budget(256), Int4(), Int2()))
    with pytest.raises(KvtuneError, match="cannot keep method snapkv"):
        export(name, what, strict=True)
    assert "not expressible" in export(name, what).files["REPORT.txt"]


option_strategy = st.builds(
    Option,
    st.sampled_from([kind() for kind in methods().values() if not kind().needs.linked]),
    st.sampled_from([ALL, Budget(0), Budget(1), Budget(100), Budget(9999), Budget(share=0.3)]),
    st.sampled_from([kind() for kind in formats().values()]),
    st.sampled_from([kind() for kind in formats().values()]),
)
rows_strategy = st.lists(st.tuples(option_strategy, option_strategy), min_size=4, max_size=4)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=12, deadline=None, derandomize=True)
@given(rows=rows_strategy)
def test_any_policy_exports_and_each_lost_method_and_format_is_reported(
    name: str, rows: Any
) -> None:
    made = export(name, document(*rows))
    text = made.files["REPORT.txt"]
    limits = exporters()[name].limits
    for option in (option for row in rows for option in row):
        if option.budget.resolve(1024) < 1024 and option.method.name not in limits.methods:
            assert re.search(rf"(not expressible|approximated): +method {option.method.name}", text)
        for role, form, known in (
            ("keys", option.keys, limits.key_formats),
            ("values", option.values, limits.value_formats),
        ):  # fmt: skip
            if form.name not in known:
                assert re.search(rf"not expressible: .*{role} [^,]*{form.name}", text)
    assert export(name, document(*rows)) == made


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=8, deadline=None, derandomize=True)
@given(data=st.data())
def test_a_policy_within_the_limits_loses_nothing(name: str, data: st.DataObject) -> None:
    """Approximations are allowed; dropping is not."""
    limits = exporters()[name].limits
    keys = formats()[data.draw(st.sampled_from(sorted(limits.key_formats)))]()
    values = formats()[data.draw(st.sampled_from(sorted(limits.value_formats)))]()
    kind = methods()[data.draw(st.sampled_from(sorted(limits.methods)))]
    budget = ALL if limits.distinct_budgets == 0 else Budget(256)
    option = Option(kind(), budget, keys, values if limits.keys_differ_from_values else keys)
    wide = option if limits.formats == "engine" else Option()
    made = export(name, document((option,) * 2, (wide,) * 2, (option,) * 2, (option,) * 2))
    assert "not expressible" not in statuses(made).values()


def test_what_is_open_is_asked_for_or_assumed_aloud() -> None:
    pattern = PolicyDocument(Pattern(Option()))
    with pytest.raises(KvtuneError, match="which model"):
        export("vllm", pattern)
    made = export("vllm", pattern, facts=FACTS)
    assert statuses(made)["context"] == "approximated"
    assert vllm_config(made)["max-model-len"] == 4096
    assert vllm_config(export("vllm", pattern, facts=FACTS, context_tokens=77))[
        "max-model-len"
    ] == 77  # fmt: skip


def test_stacks_make_room_for_the_answer_beside_the_prompt() -> None:
    serving = Serving(context_tokens=1024, generated_tokens=100, batch=2, cache_bytes=10**7)
    what = PolicyDocument(Pattern(Option()), FACTS, serving=serving)
    assert vllm_config(export("vllm", what))["max-model-len"] == 1124
    assert "ctx-size = 2248\n" in export("llama-cpp", what).files["llama-preset.ini"]


@pytest.mark.parametrize("name", NAMES)
def test_names_cannot_break_out_of_a_comment(name: str) -> None:
    rows = ((Option(),) * 2,) * 4
    what = PolicyDocument(Policy("x\nevil = 1\r\n\u2028evil\x00", rows), FACTS)
    for file, text in export(name, what).files.items():
        assert not re.search(r"^\s*evil", text, re.MULTILINE), file
        assert "\x00" not in text
    with pytest.raises(KvtuneError, match="characters"):
        find_exporter(name)().export(what, model="a\nb = 1")


def test_files_are_written_whole(tmp_path: Path) -> None:
    made = export("vllm", uniform(Option()))
    paths = write_export(made, tmp_path / "out")
    assert {path.name: path.read_text() for path in paths} == made.files
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(made.files)
    write_export(made, tmp_path / "out")
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(KvtuneError, match="cannot write"):
        write_export(made, blocked)
    with pytest.raises(KvtuneError, match="leads out"):
        write_export(replace(made, files={"../x": ""}), tmp_path / "out")


@pytest.mark.parametrize("name", ["vllm", "llama-cpp"])
def test_refinements_that_are_lost_are_reported(name: str) -> None:
    option = Option(SnapKV(), Budget(256), Int4(exact_first=4), Int4())
    policy = Policy.uniform(option, 4, 2, allocator=AdaKV())
    found = statuses(export(name, PolicyDocument(policy, FACTS)))
    assert found["allocator adakv"] == found["exact_first"] == "not expressible"


# vLLM


@pytest.mark.parametrize(
    ("keys", "values", "dtype", "status"),
    [
        (Int8(), Int8(), "int8_per_token_head", "approximated"),
        (Int4(), Int4(), "int4_per_token_head", "approximated"),
        (Fp8(), Fp8(), "fp8", "approximated"),
        (Int4TokenHead(), Int4TokenHead(), "int4_per_token_head", "kept"),
        (Int8TokenHead(), Int8TokenHead(), "int8_per_token_head", "kept"),
        (Fp8TokenHead(), Fp8TokenHead(), "fp8_per_token_head", "kept"),
        (Int8TokenHead(), Int4TokenHead(), "turboquant_k8v4", "not expressible"),
        (Fp8(), Int4(), "turboquant_k8v4", "not expressible"),
        (Int2(), Int2(), "turboquant_3bit_nc", "not expressible"),
    ],
)
def test_vllm_takes_the_nearest_dtype(keys: Any, values: Any, dtype: str, status: str) -> None:
    made = export("vllm", uniform(Option(keys=keys, values=values)))
    assert vllm_config(made)["kv-cache-dtype"] == dtype
    assert "kv-cache-dtype-skip-layers" not in vllm_config(made)
    assert statuses(made)[f"keys {keys.name}, values {values.name}"] == status


@pytest.mark.parametrize(
    ("name", "field"), [("vllm", "keys int4, values int4"), ("llama-cpp", "keys int4")]
)
@pytest.mark.parametrize("keys_by", ["channel", "token"])
def test_how_keys_were_grouped_is_told_where_it_is_lost(
    name: str, field: str, keys_by: Any
) -> None:
    made = export(name, uniform(Option(keys=Int4(keys_by=keys_by), values=Int4())))
    line = next(line for line in made.report if line.field == field)
    assert line.status == "approximated"
    assert line.detail.endswith(f"; the policy groups keys per {keys_by}")


@pytest.mark.parametrize(
    ("narrow_layers", "dtype"), [(1, "auto"), (2, "auto"), (3, "int8_per_token_head")]
)
def test_vllm_has_one_dtype_wide_enough_in_the_mean(narrow_layers: int, dtype: str) -> None:
    """It answered what is no number where it was told to leave layers out."""
    narrow, wide = Option(keys=Int4(), values=Int4()), Option()
    made = export(
        "vllm", document(*[(narrow,) * 2] * narrow_layers, *[(wide,) * 2] * (4 - narrow_layers))
    )
    assert vllm_config(made)["kv-cache-dtype"] == dtype
    assert "kv-cache-dtype-skip-layers" not in vllm_config(made)
    assert not made.keeps_loss
    assert made.wider == (dtype == "auto")


def test_vllm_windows_are_by_layer_and_of_one_size() -> None:
    small, large, all_tokens = (Option(Full(), Budget(n)) for n in (100, 300, 5000))
    rows = ((small, small), (large, large), (all_tokens, small), (all_tokens,) * 2)
    made = export("vllm", document(*rows))
    config = vllm_config(made)
    kinds = ["sliding_attention"] * 2 + ["full_attention"] * 2
    assert config["hf-overrides"] == {"sliding_window": 300, "layer_types": kinds}
    assert config["max-num-batched-tokens"] == 512
    assert statuses(made)["window"] == "approximated"
    assert statuses(made)["window sizes"] == "not expressible"
    assert statuses(made)["method full, 1 of 8 heads"] == "not expressible"


def test_vllm_reports_heads_that_keep_nothing_in_a_layer_that_slides() -> None:
    window = Option(StreamingLLM(sinks=0), Budget(256))
    row = (window, Option(H2O(), Budget(0)))
    made = export("vllm", document(row, row, row, (window, window)))
    assert vllm_config(made)["hf-overrides"]["layer_types"] == ["sliding_attention"] * 4
    assert statuses(made)["method h2o, 3 of 8 heads"] == "not expressible"
    assert "window sizes" in statuses(made)


def test_vllm_never_windows_what_needs_sinks() -> None:
    made = export("vllm", uniform(Option(StreamingLLM(), Budget(256))))
    assert "hf-overrides" not in vllm_config(made)
    plain = export("vllm", uniform(Option(StreamingLLM(sinks=0), Budget(256))))
    assert vllm_config(plain)["hf-overrides"]["sliding_window"] == 256


GOOD_VLLM: dict[str, Any] = {
    "model": "m", "max-model-len": 64, "max-num-seqs": 4, "kv-cache-dtype": "fp8",
    "max-num-batched-tokens": 512,
    "hf-overrides": {"sliding_window": 8, "layer_types": ["full_attention"] * 2},
    "kv-cache-memory-bytes": 10**6, "quantization": "fp8",
}  # fmt: skip


@pytest.mark.parametrize(
    "wrong",
    [
        {"calculate_kv_scales": True},
        {"kv-cache-dtype": "int4"},
        {"kv-cache-dtype-skip-layers": ["0"]},
        {"max-model-len": 0},
        {"kv-cache-memory-bytes": 0},
        {"quantization": "int4"},
        {"max-num-batched-tokens": 2},
        {"hf-overrides": {"sliding_window": 8, "layer_types": ["full_attention"]}},
        {"hf-overrides": {"sliding_window": 8, "layer_types": ["bogus"] * 2}},
        {"hf-overrides": {"sliding_window": 0, "layer_types": ["full_attention"] * 2}},
    ],
    ids=str,
)
def test_vllm_mirror_refuses_what_vllm_would_not_check(wrong: dict[str, Any]) -> None:
    check_vllm(GOOD_VLLM, 2)
    with pytest.raises(ValueError, match=r"."):
        check_vllm(GOOD_VLLM | wrong, 2)


def test_vllm_bytes_follow_its_allocation() -> None:
    bf16 = export("vllm", uniform(Option()))
    assert "this export 2.00 MiB" in bf16.files["REPORT.txt"]  # 4 x 2 x 1024 x 64 x 4 B
    eight = export("vllm", uniform(Option(keys=Fp8(), values=Fp8())))
    assert "this export 1.00 MiB" in eight.files["REPORT.txt"]
    wider = ModelFacts("wider", 8, 2, 64)
    rows = ((Option(keys=Fp8(), values=Int4()),) * 2,) * 8
    turbo = PolicyDocument(Policy("x", rows), wider, serving=Serving(context_tokens=1024))
    # four layers at 512 KiB, exempted by the stack itself, and four at (96 + 8) / 256 of that
    assert "this export 2.81 MiB" in export("vllm", turbo).files["REPORT.txt"]


# llama.cpp


@pytest.mark.parametrize(
    ("keys", "values", "kind", "status"),
    [
        (Int8(), Int8(), "q8_0", ("approximated", "approximated")),
        (Int4(), Int4(), "q4_0", ("approximated", "approximated")),
        (Q4(rotation="hadamard"), Q4(rotation="hadamard"), "q4_0", ("kept", "kept")),
        (Q8(rotation="hadamard"), Q8(rotation="hadamard"), "q8_0", ("kept", "kept")),
        (Q4(), Q4(), "q4_0", ("approximated", "approximated")),
        (Q8(rotation="hadamard"), Q4(), "q8_0", ("kept", "not expressible")),
        (Int8(), Int4(), "q8_0", ("approximated", "not expressible")),
        (Bf16(), Int4(), "f16", ("kept", "not expressible")),
        (Fp8(), Int2(), "q8_0", ("not expressible", "not expressible")),
        (Int2(), Int2(), "q4_0", ("not expressible", "not expressible")),
    ],
)
def test_llama_cpp_gives_keys_and_values_one_type_that_default_builds_have_kernels_for(
    keys: Any, values: Any, kind: str, status: tuple[str, str]
) -> None:
    made = export("llama-cpp", uniform(Option(keys=keys, values=values)))
    assert (preset(made)["cache-type-k"], preset(made)["cache-type-v"]) == (kind, kind)
    found = statuses(made)
    assert (found[f"keys {keys.name}"], found[f"values {values.name}"]) == status


def test_llama_cpp_turns_flash_attention_on_for_quantised_values() -> None:
    quantised = uniform(Option(keys=Int8(), values=Int8()))
    assert preset(export("llama-cpp", quantised))["flash-attn"] == "on"
    assert preset(export("llama-cpp", uniform(Option())))["flash-attn"] == "auto"


def test_llama_cpp_does_not_claim_to_evict() -> None:
    """A slot holds prompt and answer whole, so that a context shift would never come."""
    for method in (StreamingLLM(sinks=6), H2O(), Full()):
        made = export("llama-cpp", uniform(Option(method, Budget(256))))
        assert not {"keep", "context-shift"} & set(preset(made))
        assert statuses(made)[f"method {method.name}, 8 of 8 heads"] == "not expressible"


def test_llama_cpp_mixed_heads_get_enough_bits_in_the_mean() -> None:
    row = (Option(keys=Int8(), values=Int2()), Option(keys=Int2(), values=Int2()))  # 5 bits
    assert preset(export("llama-cpp", document(*[row] * 4)))["cache-type-k"] == "q8_0"


def test_llama_cpp_needs_whole_blocks() -> None:
    what = replace(uniform(Option(keys=Int4(), values=Int4())), model=ModelFacts("odd", 4, 2, 80))
    made = export("llama-cpp", what)
    assert preset(made)["cache-type-k"] == preset(made)["cache-type-v"] == "f16"
    assert statuses(made)["keys int4"] == "not expressible"


@pytest.mark.parametrize(
    ("stack", "blocks", "file", "quantised"),
    [("ollama", 32, "ollama.env", "CACHE_TYPE=q4_0"), ("mlx", 64, "mlx.txt", "--kv-bits 4")],
)
def test_heads_that_are_no_whole_blocks_stay_in_16_bits(
    stack: str, blocks: int, file: str, quantised: str
) -> None:
    def of_heads(channels: int) -> Export:
        facts = ModelFacts("odd", 4, 2, channels)
        return export(stack, replace(uniform(Option(keys=Int4(), values=Int4())), model=facts))

    assert quantised in of_heads(2 * blocks).files[file]
    odd = of_heads(blocks + blocks // 2)
    assert quantised not in odd.files[file]
    (line,) = (loss for loss in odd.report if loss.field.startswith("keys"))
    assert line.status == "not expressible"
    assert f"no multiple of {blocks}" in line.detail


def test_llama_cpp_flags_say_what_the_preset_says() -> None:
    made = export("llama-cpp", uniform(Option(StreamingLLM(), Budget(256), Int4(), Int4())))
    line = shlex.split(made.files["llama-server.txt"].splitlines()[-1])
    assert line[0] == "llama-server"
    pairs = dict(zip(line[1::2], line[2::2], strict=True))
    assert pairs == {f"--{key}": value for key, value in preset(made).items()}


@pytest.mark.parametrize(
    "wrong",
    [
        {"hf-overrides": 1},
        {"cache-type-k": "q2_K"},
        {"cache-type-k": "q8_0", "cache-type-v": "q8_0", "flash-attn": "auto"},
        {"cache-type-k": "q8_0", "cache-type-v": "q4_0"},
        {"cache-type-k": "q8_0", "cache-type-v": "q8_0"},
    ],
    ids=str,
)
def test_llama_cpp_mirror_refuses_what_the_server_would(wrong: dict[str, Any]) -> None:
    good: dict[str, Any] = {
        "model": "m",
        "cache-type-k": "f16",
        "cache-type-v": "f16",
        "flash-attn": "on",
    }
    llama_cpp.check(good, 80)
    head_dim = 80 if wrong == {"cache-type-k": "q8_0", "cache-type-v": "q8_0"} else 64
    with pytest.raises(ValueError, match=r"."):
        llama_cpp.check(good | wrong, head_dim)


# transformers (that it runs is tested in test_exporters_transformers.py)


@pytest.mark.parametrize(
    ("allocator", "status"), [(Pyramid(), "approximated"), (AdaKV(), "not expressible")]
)
def test_transformers_allocators(allocator: Any, status: str) -> None:
    option = Option(SnapKV(), Budget(share=0.25))
    policy = Policy.uniform(option, 4, 2, name="x", allocator=allocator)
    what = PolicyDocument(policy, FACTS, serving=Serving(context_tokens=1024))
    made = export("transformers", what)
    assert statuses(made)[f"allocator {allocator.name}"] == status
    plain = json.loads(made.files["kv_cache.json"])
    budgets = [[plain["options"][name]["budget"] for name in row] for row in plain["heads"]]
    expected = policy.budgets(1024).tolist() if status == "approximated" else [[0.25] * 2] * 4
    assert budgets == expected


def test_two_stacks_do_not_share_a_folder(tmp_path: Path) -> None:
    """Their reports have one name: the second export would take the first one's away."""
    first, second = export("vllm", uniform(Option())), export("sglang", uniform(Option()))
    write_export(first, tmp_path)
    write_export(first, tmp_path)
    with pytest.raises(KvtuneError, match="report of an export to vLLM") as told:
        write_export(second, tmp_path)
    assert told.value.hint
    assert (tmp_path / "REPORT.txt").read_text("utf-8") == first.files["REPORT.txt"]
