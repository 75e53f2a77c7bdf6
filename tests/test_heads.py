"""Head scores: the file, published forms, detectors against straight-line sums, and policies."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from kvtune.common.errors import KvtuneError
from kvtune.policies import head_plans
from kvtune.policies.head_scores import (
    About,
    HeadScores,
    read_gates,
    read_heads,
    read_retrieval,
    write_gates,
    write_heads,
    write_retrieval,
)
from kvtune.policies.methods.full import Full
from kvtune.policies.methods.razor import Razor
from kvtune.policies.policy_file.document import PolicyDocument, read_policy, write_policy
from kvtune.policies.testing import uniform
from kvtune.runtime.head_detectors import overlaps, repeated_mass, repeated_tokens

pytestmark = pytest.mark.usefixtures("one_thread")

RNG = np.random.default_rng(3)


def scores(layers: int = 4, heads: int = 6) -> HeadScores:
    drawn = RNG.random((layers, heads)).astype(np.float32)
    gates = RNG.random((layers, heads // 3)).astype(np.float32)
    about = {
        "retrieval": About("query heads", "Wu et al.", "6 samples", 3),
        "duo": About("KV heads", "imported gates"),
    }
    return HeadScores("a-model", "f00d", {"retrieval": drawn, "duo": gates}, about)


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    path, before = tmp_path / "heads.safetensors", scores()
    write_heads(before, path)
    after = read_heads(path)
    assert (after.model, after.fingerprint) == (before.model, before.fingerprint)
    assert after.about == before.about
    for name, score in before.scores.items():
        np.testing.assert_array_equal(after.scores[name], score)


def test_a_damaged_file_is_refused_with_its_name(tmp_path: Path) -> None:
    path = tmp_path / "heads.safetensors"
    write_heads(scores(), path)
    whole = path.read_bytes()
    for at in range(
        0, len(whole) - 200, 37
    ):  # it reads as some scores, or says which file is wrong
        path.write_bytes(whole[:at] + b"\x00" + whole[at + 1 :])
        with contextlib.suppress(KvtuneError):
            assert read_heads(path).scores
    path.write_bytes(whole[:50])
    with pytest.raises(KvtuneError, match="no safetensors"):
        read_heads(path)


def test_a_file_of_other_numbers_is_refused(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    path = tmp_path / "other.safetensors"
    save_file({"retrieval": np.zeros((2, 2), np.float32)}, path)
    with pytest.raises(KvtuneError):
        read_heads(path)


def test_published_gates_are_read_and_written(tmp_path: Path) -> None:
    path = tmp_path / "full_attention_heads.tsv"
    path.write_text("0.5\t-0.1\n1.25\t0.75\n")
    np.testing.assert_allclose(read_gates(path), np.array([[0.5, 0], [1, 0.75]]))
    again = tmp_path / "again.tsv"
    write_gates(read_gates(path), again)
    np.testing.assert_array_equal(read_gates(again), read_gates(path))


@pytest.mark.parametrize("text", ["", "0.5\tx\n", "0.5\n0.5\t0.5\n", "nan\n"])
def test_a_broken_table_of_gates_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "gates.tsv"
    path.write_text(text)
    with pytest.raises(KvtuneError):
        read_gates(path)


def test_published_retrieval_heads_are_means_over_samples(tmp_path: Path) -> None:
    path = tmp_path / "model.json"
    path.write_text(json.dumps({"0-0": [0.0, 1.0], "0-1": [0.25], "1-0": [0.0], "1-1": [1.0]}))
    np.testing.assert_allclose(read_retrieval(path), np.array([[0.5, 0.25], [0, 1]]))
    again = tmp_path / "again.json"
    write_retrieval(read_retrieval(path), again)
    np.testing.assert_array_equal(read_retrieval(again), read_retrieval(path))


@pytest.mark.parametrize("fields", [{}, {"0-0": []}, {"0,0": [1]}, {"0-1": [1]}, {"0-0": ["x"]}])
def test_broken_retrieval_heads_are_refused(tmp_path: Path, fields: object) -> None:
    path = tmp_path / "model.json"
    path.write_text(json.dumps(fields))
    with pytest.raises(KvtuneError):
        read_retrieval(path)


def test_a_kv_head_scores_as_the_best_of_its_group() -> None:
    heads = scores()
    grouped = heads.of_kv_heads("retrieval", 2)
    np.testing.assert_array_equal(grouped, heads.score("retrieval").reshape(4, 2, 3).max(-1))
    with pytest.raises(KvtuneError, match="KV heads"):
        heads.of_kv_heads("duo", 3)
    with pytest.raises(KvtuneError, match="no score"):
        heads.score("retreival")


def test_heads_of_two_models_are_not_joined() -> None:
    other = HeadScores(
        "b-model", "", {"x": np.ones((4, 2), np.float32)}, {"x": About("KV heads", "m")}
    )
    with pytest.raises(KvtuneError, match="b-model"):
        scores().joined(other)


def test_echo_and_induction_are_the_sums_of_the_attention_matrix() -> None:
    heads, group, block, repeats, size = 2, 2, 7, 3, 8
    tokens = block * repeats
    q, k = uniform(1, heads * group, tokens, size), uniform(2, heads, tokens, size)
    echo, induction = repeated_mass(q, k, block, 0.4)
    for head in range(heads * group):
        logits = 0.4 * q[head].double().numpy() @ k[head // group].double().numpy().T
        both = [0.0, 0.0]
        for i in range(block, tokens):
            row = np.exp(logits[i, : i + 1])
            row /= row.sum()
            earlier = range(i - block, -1, -block)
            both[0] += sum(row[j] for j in earlier)
            both[1] += sum(row[j + 1] for j in earlier)
        assert float(echo[head]) == pytest.approx(both[0] / (tokens - block), abs=1e-5)
        assert float(induction[head]) == pytest.approx(both[1] / (tokens - block), abs=1e-5)


def test_a_head_that_copies_what_followed_is_an_induction_head() -> None:
    """Keys that say which token came before them, queries that say which token they are."""
    block, repeats = 16, 3
    place = torch.arange(block * repeats) % block
    say = torch.nn.functional.one_hot(place, block).float() * 8
    before = say.roll(1, 0)
    echo, induction = repeated_mass(say[None], before[None], block, 1.0)
    assert induction > 0.95
    assert echo < 0.05
    echo, induction = repeated_mass(say[None], say[None], block, 1.0)
    assert echo > 0.4, "the token itself is one of those with its key"
    assert induction < 0.05


def test_repeated_tokens_repeat_and_are_distinct_within_a_block() -> None:
    ids = repeated_tokens(1000, 50, 4, 7)
    assert ids == ids[:50] * 4
    assert len(set(ids)) == 50
    assert ids == repeated_tokens(1000, 50, 4, 7) != repeated_tokens(1000, 50, 4, 8)


def test_razor_keeps_the_top_of_either_score_in_full() -> None:
    induction, echo = RNG.random((10, 8)), RNG.random((10, 8))
    policy = head_plans.razor_plan(
        induction.astype(np.float32), echo.astype(np.float32), 32768, buffer=4000
    )
    full = np.array([[isinstance(o.method, Full) for o in row] for row in policy.heads])
    wanted = set(np.argsort(-induction, axis=None)[:11]) | {int(echo.argmax())}
    assert set(np.flatnonzero(full)) == wanted
    rest = next(o for o in policy.options() if isinstance(o.method, Razor))
    assert rest.budget.tokens == 4 + 6554 + 1  # sinks, a fifth of the prompt, what stands for all


def test_gates_keep_as_many_heads_as_the_sparsity_leaves() -> None:
    gates = np.ones((4, 4), np.float32)  # saturated: ties must not be drawn
    policy = head_plans.gates_plan("DuoAttention", gates, 0.75, head_plans.DUO, 256)
    full = [isinstance(o.method, Full) for o in policy.options()]
    assert full == [True] * 4 + [False] * 12
    assert {o.budget.tokens for o in policy.options()} == {None, 320}


def test_headkv_shares_out_the_pool_and_keeps_the_mean() -> None:
    importance = RNG.random((6, 4)).astype(np.float32) ** 3
    policy = head_plans.headkv_plan(importance, 128, beta=1.5)
    caps = np.array([o.budget.tokens for o in policy.options()], float)
    pool = int(120 / 1.5)
    wanted = importance.ravel() / importance.sum() * pool * 24 + 120 - pool + 8
    assert np.abs(caps - wanted).max() <= 0.5
    assert caps.mean() == pytest.approx(128, abs=0.5)


def test_policies_of_heads_are_policy_files() -> None:
    policy = head_plans.headkv_plan(RNG.random((3, 2)).astype(np.float32), 64)
    text = write_policy(PolicyDocument(policy))
    assert read_policy(text).bind(3, 2).heads == policy.heads


def test_a_score_overlaps_with_itself() -> None:
    heads = scores()
    twice = HeadScores(
        heads.model,
        "",
        {"one": heads.scores["retrieval"], "two": heads.scores["retrieval"]},
        dict.fromkeys(("one", "two"), heads.about["retrieval"]),
    )
    assert list(overlaps(twice, 2, 0.25)) == [("one", "two", 1.0)]


def test_commands_import_export_and_make_policies(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from kvtune.__main__ import main

    gates, out = tmp_path / "gates.tsv", tmp_path / "heads.safetensors"
    gates.write_text("0.9\t0.1\n0.2\t0.8\n")
    found = ["--out", str(out), "--model", "a-model"]
    assert main(["heads", "import", str(gates), "--score", "duo", *found]) == 0
    retrieval = tmp_path / "model.json"
    write_retrieval(np.array([[0.5, 0, 0, 0], [0, 0, 0, 0.2]], np.float32), retrieval)
    assert main(["heads", "import", str(retrieval), "--score", "retrieval", *found]) == 0
    assert set(read_heads(out).scores) == {"duo", "retrieval"}
    made = tmp_path / "policy.yaml"
    words = ["heads", "policy", str(out), "--kv-heads", "2", "--out", str(made), "--system"]
    for system in ("duo", "headkv"):
        assert main([*words, system]) == 0
        assert read_policy(made.read_text()).bind(2, 2).layers == 2
    again = tmp_path / "again.tsv"
    assert main(["heads", "export", str(out), "--score", "duo", "--out", str(again)]) == 0
    np.testing.assert_array_equal(read_gates(again), read_gates(gates))
    capsys.readouterr()
    assert main([*words, "razor"]) == 2
    assert "no score is called 'echo'" in capsys.readouterr().err
    json_ = tmp_path / "duo.json"
    assert main(["heads", "export", str(out), "--score", "duo", "--out", str(json_)]) == 2
    assert not json_.exists()
