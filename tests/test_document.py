from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtune.common.errors import KvtuneError
from kvtune.common.estimate import Estimate
from kvtune.policies.allocator import allocators
from kvtune.policies.allocators.as_given import AsGiven
from kvtune.policies.format import formats
from kvtune.policies.formats.grouped import Int2, Int4
from kvtune.policies.method import methods
from kvtune.policies.methods.snapkv import SnapKV
from kvtune.policies.option import ALL, Budget, Option
from kvtune.policies.policy import Policy
from kvtune.policies.policy_file.document import (
    ModelFacts,
    Pattern,
    PolicyDocument,
    PolicyFileError,
    Provenance,
    Quality,
    Serving,
    as_plain,
    read_policy,
    write_policy,
)

HEADS = """\
kvtune_policy: 1
model: {name: smollm2-135m, layers: 2, kv_heads: 3, head_dim: 64}
options:
  a: {method: snapkv, budget: 12.5%, keys: int4, values: int2}
  b: {method: {name: snapkv, window: 16, kernel: 5}, budget: 256, keys: {name: int4, group: 32}}
allocator: as_given
heads:                        # one line a layer, one option a KV head
  - [a, a, b]
  - [a, b, b]
"""
UNIFORM = """\
kvtune_policy: 1
policy: {method: snapkv, budget: 256, keys: int4, values: int4}
"""


def parameter_values(hint: Any, low: float | None, high: float | None) -> st.SearchStrategy[Any]:
    """Any value that a parameter's annotation and bounds allow."""
    choices = [hint] if get_origin(hint) is Literal else (get_args(hint) or [hint])
    kinds: list[st.SearchStrategy[Any]] = []
    for kind in choices:
        if get_origin(kind) is Literal:
            kinds.append(st.sampled_from(get_args(kind)))
        elif kind is int:
            kinds.append(st.integers(int(low or 0), int(high or 10_000)))
        elif kind is float:
            kinds.append(st.floats(low or 0, high or 1e6))
        else:
            kinds.append({bool: st.booleans(), str: st.text(max_size=9)}.get(kind, st.none()))
    return st.one_of(kinds)


@st.composite
def components(draw: st.DrawFn, kinds: dict[str, type[Any]]) -> Any:
    kind = kinds[draw(st.sampled_from(sorted(kinds)))]
    hints, values = get_type_hints(kind), {}
    for each in fields(kind):
        if draw(st.booleans()):
            bounds = each.metadata
            values[each.name] = draw(
                parameter_values(hints[each.name], bounds["low"], bounds["high"])
            )
    try:
        return kind(**values)
    except KvtuneError:  # a rule between values, such as an odd kernel
        return kind()


budgets = st.one_of(
    st.just(ALL),
    st.integers(1, 10**6).map(lambda tokens: Budget(tokens=tokens)),
    st.floats(1e-6, 1).map(lambda share: Budget(share=share)),
)
options = st.builds(
    Option, components(methods()), budgets, components(formats()), components(formats())
)
estimates = st.tuples(st.floats(0, 9), st.floats(0, 9), st.floats(0, 9)).map(
    lambda x: Estimate(x[0], min(x[1:]), max(x[1:]), "nats/token", "table")
)
words = st.text(st.characters(codec="utf-8", exclude_categories=["C"]), max_size=12).filter(
    lambda text: not text.startswith(("/", "~", "\\")) and ":" not in text[:3]
)
qualities = st.one_of(
    st.builds(Quality, st.just("own trace"), st.just(""), st.none() | estimates),
    st.builds(Quality, st.just("stand-in"), st.just("smollm2-135m"), st.none() | estimates),
)
provenances = st.builds(
    Provenance,
    quality=st.none() | qualities,
    kvtune=words,
    trace=words,
    seed=st.none() | st.integers(0, 2**31),
    memory=st.dictionaries(
        words, st.integers() | st.floats(allow_nan=False, allow_infinity=False) | words, max_size=3
    ),
)
servings = st.builds(Serving, words, st.none() | st.integers(1, 10**6), st.none() | st.just(4))


@st.composite
def documents(draw: st.DrawFn) -> PolicyDocument:
    layers, heads = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    palette = draw(st.lists(options, min_size=1, max_size=3))
    pick = st.sampled_from(palette)
    allocator = draw(components(allocators()))
    policy: Policy | Pattern
    if draw(st.booleans()):
        rows = [tuple(draw(pick) for _ in range(heads)) for _ in range(layers)]
        policy = Policy(draw(words) or "policy", tuple(rows), allocator)
    else:
        width = st.sampled_from([1, heads])
        which = draw(st.sets(st.integers(0, layers - 1)))
        exceptions = [
            (layer, tuple(draw(pick) for _ in range(draw(width)))) for layer in sorted(which)
        ]
        policy = Pattern(draw(pick), tuple(exceptions), allocator, draw(words))
    try:
        policy.check_allocator()
    except KvtuneError:
        policy = replace(policy, allocator=AsGiven())
    model = ModelFacts("some/model", layers, heads, 64) if draw(st.booleans()) else None
    return PolicyDocument(policy, model, draw(st.none() | provenances), draw(st.none() | servings))


@settings(max_examples=20, deadline=None)
@given(documents())
def test_what_is_written_reads_back_equal(document: PolicyDocument) -> None:
    text = write_policy(document)
    assert read_policy(text) == document
    assert write_policy(read_policy(text)) == text


@settings(max_examples=20, deadline=None, derandomize=True)
@given(documents())
def test_plain_form_is_what_the_yaml_holds(document: PolicyDocument) -> None:
    plain = as_plain(document)
    assert read_policy(json.dumps(plain, ensure_ascii=False)) == document
    loaded = yaml.safe_load(write_policy(document))
    assert json.loads(json.dumps(loaded)) == json.loads(json.dumps(plain))


def test_heads_are_read_layer_by_layer() -> None:
    document = read_policy(HEADS)
    a = Option(SnapKV(), Budget(share=0.125), Int4(), Int2())
    b = Option(SnapKV(window=16, kernel=5), Budget(tokens=256), Int4(group=32))
    assert document.bind(2, 3).heads == ((a, a, b), (a, b, b))


def test_short_form_takes_any_shape_and_its_exceptions() -> None:
    text = UNIFORM + "options:\n  x: {}\n  y: {budget: 8}\nlayers: {0: x, 2: [x, y]}\n"
    bound = read_policy(text).bind(3, 2)
    u = Option(SnapKV(), Budget(tokens=256), Int4(), Int4())
    assert bound.heads == ((Option(), Option()), (u, u), (Option(), Option(budget=Budget(8))))


def test_anchors_stand_for_what_they_name() -> None:
    text = HEADS.replace("[a, a, b]", "&row [a, a, b]").replace("[a, b, b]", "*row")
    first, second = read_policy(text).bind(2, 3).heads
    assert first == second


def test_a_file_reads_like_its_text(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(HEADS)
    assert read_policy(path) == read_policy(str(path)) == read_policy(HEADS)


WRONG = {
    "unknown top key": (HEADS + "hedas: []\n", 10, "'hedas'", "'heads'"),
    "unknown option key": (HEADS.replace("budget: 256", "buget: 256"), 5, "'buget'", "'budget'"),
    "unknown method": (HEADS.replace(": snapkv", ": snapvk"), 4, "'snapvk'", "'snapkv'"),
    "unknown format": (HEADS.replace("int2", "int5"), 4, "'int5'", "'int"),
    "unknown allocator": (HEADS.replace("as_given", "pyramidd"), 6, "'pyramidd'", "'pyramid'"),
    "unknown parameter": (HEADS.replace("window", "windwo"), 5, "'windwo'", "'window'"),
    "parameter of none": (
        HEADS.replace("method: snapkv,", "method: {name: full, w: 1},"), 4, "'w'", "no parameters",
    ),
    "text for a number": (HEADS.replace("window: 16", "window: many"), 5, "window", ""),
    "float for a number": (HEADS.replace("window: 16", "window: 1.5"), 5, "window", ""),
    "true for a number": (HEADS.replace("window: 16", "window: true"), 5, "window", ""),
    "number for a name": (HEADS.replace("method: snapkv", "method: 7"), 4, "method", ""),
    "below its least": (HEADS.replace("window: 16", "window: 0"), 5, "at least 1", ""),
    "above its most": (
        HEADS.replace("as_given", "{name: adakv, safeguard: 1.5}"), 6, "at most 1", "",
    ),
    "rule of the method": (HEADS.replace("kernel: 5", "kernel: 4"), 5, "odd kernel", ""),
    "float budget": (HEADS.replace("12.5%", "0.125"), 4, "0.125", "12.5%"),
    "negative budget": (HEADS.replace("12.5%", "-1"), 4, "-1", "tokens"),
    "too large a share": (HEADS.replace("12.5%", "120%"), 4, "120%", "share"),
    "quoted budget": (HEADS.replace("12.5%", "'256'"), 4, "'256'", "tokens"),
    "undefined option": (HEADS.replace("[a, a, b]", "[a, aa, b]"), 8, "'aa'", "'a'"),
    "short layer": (HEADS.replace("[a, a, b]", "[a, b]"), 8, "2 options", ""),
    "missing layer": (HEADS.replace("  - [a, b, b]\n", ""), 8, "1 layers", ""),
    "layer is no list": (HEADS.replace("[a, b, b]", "a"), 9, "list", ""),
    "no layers": (HEADS.split("\nheads:")[0] + "\nheads: []\n", 7, "needs 1", ""),
    "newer version": (HEADS.replace("policy: 1", "policy: 3"), 1, "version 3", "update"),
    "version no number": (HEADS.replace("policy: 1", "policy: one"), 1, "whole number", ""),
    "version missing": (HEADS.split("\n", 1)[1], 1, "'kvtune_policy'", "kvtune_policy: 1"),
    "doubled key": (HEADS + "name: x\nname: y\n", 11, "'name' stands here twice", ""),
    "both forms": (HEADS + "policy: a\n", 1, "not both", ""),
    "neither form": ("kvtune_policy: 1\nname: x\n", 1, "needs 'policy'", ""),
    "exceptions of heads": (HEADS + "layers: {0: a}\n", 10, "beside 'policy'", ""),
    "layer beyond": (
        HEADS.split("\nheads:")[0] + "\npolicy: a\nlayers: {2: b}\n", 8, "layers 0 to 1", "",
    ),
    "layer no number": (UNIFORM + "layers: {first: a}\n", 3, "'first'", ""),
    "stand-in unnamed": (
        UNIFORM + "provenance: {quality: {source: stand-in}}\n", 3, "must be named", "",
    ),
    "half a figure": (
        UNIFORM + "provenance: {quality: {source: own trace, tier: table}}\n", 3, "needs", "",
    ),
    "a tag": (UNIFORM + "name: !!python/name:os.system x\n", 3, "tags", ""),
    "unknown alias": (UNIFORM + "name: *a\n", 3, "", ""),
    "two documents": (UNIFORM + "---\na: 1\n", 3, "second document", ""),
    "broken syntax": ("kvtune_policy: 1\npolicy: {a: [}\n", 2, "no valid YAML", ""),
    "not a mapping": ("- 1\n- 2\n", 1, "must be a mapping", ""),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_mistake_is_refused_with_its_line(case: str, tmp_path: Path) -> None:
    text, line, message, hint = WRONG[case]
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(KvtuneError) as caught:
        read_policy(path)
    assert caught.value.where == f"{path}:{line}"
    assert message in caught.value.message
    assert hint in (caught.value.hint or "")


def test_all_mistakes_are_reported_at_once() -> None:
    text = HEADS.replace("int2", "int5").replace("window: 16", "window: 0").replace("a, b, b", "c")
    with pytest.raises(PolicyFileError) as caught:
        read_policy(text)
    assert [problem.line for problem in caught.value.problems] == [4, 5, 9, 9]
    hint = str(caught.value.hint).splitlines()
    assert hint[1:3] == [
        "3 more problems:",
        "  line 5: options.b.method.window: must be at least 1, not 0",
    ]
    assert [line.split(":")[0] for line in hint[3:]] == ["  line 9", "  line 9"]


def test_keys_that_are_missing_together_are_one_mistake() -> None:
    with pytest.raises(PolicyFileError) as caught:
        read_policy(UNIFORM + "model: {name: mine, layers: 2}\n")
    assert caught.value.message == "model: the keys 'kv_heads' and 'head_dim' are missing"
    assert "kvtune models" in str(caught.value.hint)
    assert len(caught.value.problems) == 1


def test_a_file_full_of_mistakes_is_not_told_in_full() -> None:
    with pytest.raises(PolicyFileError) as caught:
        read_policy(UNIFORM + "".join(f"wrong_{i}: 1\n" for i in range(20)))
    hint = str(caught.value.hint).splitlines()
    assert hint[-1] == "  and 11 below those"
    assert sum(line.startswith("  line") for line in hint) == 8


@pytest.mark.parametrize("text", ["", "# only a comment\n", "\n\n"])
def test_empty_file_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "empty.yaml"
    path.write_text(text)
    with pytest.raises(KvtuneError, match="empty"):
        read_policy(path)


def test_unreadable_files_are_refused(tmp_path: Path) -> None:
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\x00\x80")
    for path in (tmp_path / "missing.yaml", tmp_path, binary):
        with pytest.raises(KvtuneError) as caught:
            read_policy(path)
        assert str(path) in str(caught.value)


def bombs() -> dict[str, str]:
    laughs = "l0: &l0 [x,x,x,x,x,x,x,x,x]\n" + "".join(
        f"l{i}: &l{i} [{','.join([f'*l{i - 1}'] * 9)}]\n" for i in range(1, 12)
    )
    provenance = "kvtune_policy: 1\npolicy: {}\nprovenance:\n  memory:\n"
    in_figures = laughs.replace("\nl", "\n    l").replace("l0: &l0", "    l0: &l0", 1)
    return {
        "laughs at the top": "kvtune_policy: 1\npolicy: {}\n" + laughs,
        "laughs in figures": provenance + in_figures,
        "long shared rows": "kvtune_policy: 1\noptions: {a: {}}\nheads:\n  - &r ["
        + "a," * 5000 + "a]\n" + "  - *r\n" * 5000,
        "deep": "kvtune_policy: 1\npolicy: " + "[" * 900 + "\n",
        "deeper": "kvtune_policy: 1\npolicy: " + "[" * 200_000 + "\n",
        "large": "kvtune_policy: 1\n" + "#" * 2**21,
        "recursive": "kvtune_policy: 1\npolicy: &p {keys: *p}\n",
    }  # fmt: skip


@pytest.mark.parametrize("bomb", bombs())
def test_bombs_are_refused(bomb: str) -> None:
    with pytest.raises(KvtuneError):
        read_policy(bombs()[bomb])


def test_binding_to_another_shape_is_refused() -> None:
    with pytest.raises(KvtuneError, match="2 layers"):
        read_policy(HEADS).bind(30, 3)
    with pytest.raises(KvtuneError, match="names layer 7"):
        read_policy(UNIFORM + "options: {a: {}}\nlayers: {7: a}\n").bind(2, 3)
    with pytest.raises(KvtuneError, match="2 options"):
        read_policy(UNIFORM + "options: {a: {}}\nlayers: {0: [a, a]}\n").bind(2, 3)


def test_paths_of_this_machine_are_not_written() -> None:
    provenance = Provenance(trace="/home/me/traces/t1", memory={"from": ["/var/x/card.yaml"]})
    model = ModelFacts("/home/me/models/mine", 1, 1, 64)
    text = write_policy(PolicyDocument(Pattern(Option()), model, provenance))
    assert "/home" not in text
    assert "/var" not in text
    assert "name: mine" in text


def test_stand_in_is_said_in_the_header() -> None:
    document = read_policy(HEADS)
    assert document.stand_in == ""
    marked = replace(document, provenance=Provenance(Quality("stand-in", "smollm2-135m")))
    assert marked.stand_in == "smollm2-135m"
    assert "# quality: stand-in (smollm2-135m)\n" in write_policy(marked)
