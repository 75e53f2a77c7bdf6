"""Files of other tools become policies, and nothing in them is run."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest

from kvtune.common.errors import KvtuneError
from kvtune.policies.export.importer import read_foreign
from kvtune.policies.option import ALL

L, H = 3, 2


def write(path: Path, text: str) -> Path:
    path.write_text(text, "utf-8")
    return path


def test_kvtuner_gives_each_layer_its_bits(tmp_path: Path) -> None:
    text = "".join(
        f"{layer}:\n  nbits_key: {key}\n  nbits_value: {value}\n"
        for layer, (key, value) in enumerate([(8, 8), (4, 2), (16, 4)])
    )
    policy = read_foreign(write(tmp_path / "a.yaml", text), "kvtuner", L, H)
    names = [[(o.keys.name, o.values.name) for o in row] for row in policy.heads]
    assert names == [[("int8", "int8")] * H, [("int4", "int2")] * H, [("bf16", "int4")] * H]
    assert {option.budget for option in policy.options()} == {ALL}


def test_duo_attention_heads_above_one_half_keep_all(tmp_path: Path) -> None:
    path = write(tmp_path / "heads.tsv", "1.0\t0.2\n0.51\t0.5\n0\t9.9e-01\n")
    policy = read_foreign(path, "duo-attention", L, H)
    full = [[option.budget == ALL for option in row] for row in policy.heads]
    assert full == [[True, False], [True, False], [False, True]]
    streaming = policy.heads[0][1]
    assert (streaming.method.name, streaming.budget.tokens) == ("streaming_llm", 320)
    assert streaming.method.sinks == 64  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("table", "kept"),
    [
        ([[0.5, 0.25], [1.0, 0.125], [0.0, 0.01]], [512, 256, 1024, 128, 0, 10]),
        ([[512, 0], [7, 2000], [1, 3]], [512, 0, 7, 1024, 1, 3]),
    ],
)
def test_budgets_are_shares_up_to_one_and_tokens_above(
    tmp_path: Path, table: list[list[float]], kept: list[int]
) -> None:
    np.save(tmp_path / "b.npy", np.array(table))
    policy = read_foreign(tmp_path / "b.npy", "budgets", L, H)
    assert policy.budgets(1024).ravel().tolist() == kept


class Harm:
    """What a pickle would run."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (Path.touch, (Path("harmed"),))  # type: ignore[return-value]


def test_an_array_of_objects_is_refused_and_nothing_is_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    np.save("b.npy", np.array([[Harm(), 1]], dtype=object), allow_pickle=True)
    (tmp_path / "c.npy").write_bytes(pickle.dumps(Harm()))
    for name in ("b.npy", "c.npy"):
        with pytest.raises(KvtuneError, match="plain numbers"):
            read_foreign(Path(name), "budgets", L, H)
    assert not Path("harmed").exists()


@pytest.mark.parametrize(
    ("kind", "text", "message"),
    [
        ("kvtuner", "0: {nbits_key: 5, nbits_value: 4}", "no format of 5 bits"),
        ("kvtuner", "0: {nbits_key: true, nbits_value: 4}", "no format of True bits"),
        ("kvtuner", "0: {nbits_key: 4}", "layer 0: nbits_key and nbits_value are wanted"),
        ("kvtuner", "1: {nbits_key: 4, nbits_value: 4}", "a number for each layer from 0 on"),
        ("kvtuner", "[4, 4]", "a number for each layer from 0 on"),
        ("kvtuner", "{", "not readable as YAML"),
        ("kvtuner", "0: {nbits_key: 4, nbits_value: 4}", "1 layers of 2 KV heads, the model has 3"),
        ("duo-attention", "a\tb\n", "no table of numbers"),
        ("duo-attention", "1\tnan\n0\t0\n0\t0\n", "not finite"),
        ("duo-attention", "1\t0\n1\n0\t0\n", "no table of numbers"),
        ("duo-attention", "1\t0\t1\n", "the model has 3 of 2"),
        ("budgets", "no numpy", "plain numbers"),
    ],
)
def test_what_such_files_do_not_hold_is_told(
    tmp_path: Path, kind: str, text: str, message: str
) -> None:
    with pytest.raises(KvtuneError) as told:
        read_foreign(write(tmp_path / "x", text), kind, L, H)
    assert message in f"{told.value.where}: {told.value}"
