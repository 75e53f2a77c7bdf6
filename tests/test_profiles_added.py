"""Cards and bundles that users add: kept, found, checked; nothing half-written."""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import pytest

from kvtune.__main__ import main
from kvtune.common.errors import KvtuneError
from kvtune.profiles.added import add
from kvtune.profiles.gpus import find_gpu, forget_cards, user_folder
from kvtune.profiles.measured import find_measured, forget_measured

CARD = """\
name: My card
aliases: [bench card]
vendor: nvidia
architecture: ada
memory_kind: gddr
figures:
  memory_nominal: {value: 24, unit: GiB, kind: datasheet, date: 2024-01, source: a sheet}
  memory_visible: {value: 24000, unit: MiB, kind: measured, date: 2024-01, source: nvidia-smi}
  bandwidth: {value: 1000, unit: GB/s, kind: datasheet, date: 2024-01, source: a sheet}
  bf16: {value: 100, unit: TFLOP/s, kind: datasheet, date: 2024-01, source: a sheet}
  context: {value: 400, unit: MiB, kind: assumed, date: 2024-01, source: a guess}
"""


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("KVTUNE_CACHE", str(tmp_path / "cache"))
    forget_cards()
    forget_measured()
    yield tmp_path
    forget_cards()
    forget_measured()


@pytest.fixture
def card(home: Path) -> Path:
    (home / "my-card.yaml").write_text(CARD)
    return home / "my-card.yaml"


@pytest.fixture
def bundle(home: Path) -> Path:
    shipped = resources.files("kvtune.profiles") / "measured" / "h200"
    folder = home / "bundle"
    folder.mkdir()
    lines = (shipped / "kernels.csv").read_text(encoding="utf-8").splitlines(keepends=True)
    (folder / "kernels.csv").write_text("".join(lines[:400]))
    (folder / "gpu.yaml").write_text((shipped / "gpu.yaml").read_text(encoding="utf-8"))
    return folder


def test_a_card_is_found_after_it_was_added(card: Path) -> None:
    assert add(card).slug == "my-card"
    card.unlink()
    assert find_gpu("Bench Card").bandwidth_bytes_per_s == 1e12
    assert find_gpu("my-card").visible_bytes == 24000 * 2**20


def test_a_card_may_not_take_anothers_name(card: Path) -> None:
    card.write_text(CARD.replace("bench card", "RTX 4090"))
    with pytest.raises(KvtuneError, match="RTX 4090 is already called '4090'"):
        add(card)
    shutil.copy(card, card.with_name("h100-sxm.yaml"))
    with pytest.raises(KvtuneError, match=r"already called|ships a card"):
        add(card.with_name("h100-sxm.yaml"))
    assert not user_folder().exists()


@pytest.mark.parametrize("packed", [False, True])
def test_a_bundle_answers_before_what_is_shipped(bundle: Path, packed: bool) -> None:
    shipped = find_measured("h200")
    path = bundle
    if packed:
        path = bundle.with_suffix(".zip")
        with zipfile.ZipFile(path, "w") as archive:
            for file in bundle.iterdir():
                archive.write(file, f"deep/../{file.name}")
    added = add(path)
    found = find_measured("h200")
    assert shipped is not None
    assert found is not None
    assert (added.kind, added.points, len(found.rows)) == ("bundle", 399, 399)
    assert len(shipped.rows) > 399


def test_a_bundle_that_was_changed_is_refused(bundle: Path) -> None:
    stored = add(bundle).path / "kernels.csv"
    stored.write_text(stored.read_text().replace("cold", "warm", 1))
    forget_measured()
    with pytest.raises(KvtuneError, match="changed since it was added"):
        find_measured("h200")


def test_kernels_above_the_sheet_are_refused(bundle: Path) -> None:
    file = bundle / "gpu.yaml"
    file.write_text(file.read_text().replace("gpu: h200", "gpu: l4"))
    with pytest.raises(KvtuneError, match=r"a kernel reaches .* above the L4's 300"):
        add(bundle)
    assert not user_folder().exists()


@pytest.mark.parametrize("missing", ["gpu.yaml", "kernels.csv"])
def test_an_unfinished_bundle_is_refused(bundle: Path, missing: str) -> None:
    (bundle / missing).unlink()
    with pytest.raises(KvtuneError, match=f"{missing} is missing"):
        add(bundle)


def test_the_command_adds_and_lists(card: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["gpus", "add", str(card), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["added"]["slug"] == "my-card"
    assert main(["gpus"]) == 0
    assert "My card" in capsys.readouterr().out
    assert main(["gpus", "add"]) == 2
    assert "kvtune gpus add FILE" in capsys.readouterr().err


# --- a card in options -------------------------------------------------------------------------


def estimate(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    assert main(["estimate", "-m", "llama-8b", "--json", *words]) == 0
    answer: dict[str, Any] = json.loads(capsys.readouterr().out)
    return answer


def test_a_card_is_described_in_numbers(card: Path, capsys: pytest.CaptureFixture[str]) -> None:
    numbers = ("--gpu-memory", "24000MiB", "--gpu-bandwidth", "1TB/s", "--gpu-flops", "100TFLOPS")
    described = estimate(capsys, *numbers)
    filed = estimate(capsys, "--gpu", str(card))
    step, same = (one["policies"][0]["latency"]["value"] for one in (described, filed))
    assert step == pytest.approx(same)


def test_a_known_card_gets_another_memory(capsys: pytest.CaptureFixture[str]) -> None:
    answer = estimate(capsys, "--gpu", "m3-max", "--gpu-memory", "48GiB")
    assert answer["budget"]["device_bytes"] == 48 * 2**30


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--gpu-memory", "24GiB"), "needs --gpu-memory, --gpu-bandwidth and --gpu-flops"),
        (("--gpu", "4090", "--gpu-bandwidth", "1008"), "no rate in GB/s or TB/s"),
        (("--gpu", "4090", "--gpu-flops", "-1TFLOPS"), "no rate in TFLOPS"),
        (("--gpu", "h200", "--gpus", "3"), "3 GPUs cannot share evenly"),
    ],
)
def test_what_cannot_be_a_card_is_refused(
    words: tuple[str, ...], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["estimate", "-m", "llama-8b", *words]) == 2
    assert says in " ".join(capsys.readouterr().err.split())


def test_four_gpus_hold_a_quarter_each_and_take_longer_than_a_quarter(
    capsys: pytest.CaptureFixture[str],
) -> None:
    one = estimate(capsys, "--gpu", "b200", "--batch", "8")
    four = estimate(capsys, "--gpu", "b200", "--batch", "8", "--gpus", "4")
    whole, part = (answer["policies"][0] for answer in (one, four))
    assert 4 * part["prompt_bytes"] == whole["prompt_bytes"]
    assert 0.25 < part["latency"]["value"] / whole["latency"]["value"] < 1
