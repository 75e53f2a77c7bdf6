"""What is used of transformers is listed, is there, and does not hang on an argument's name."""

from __future__ import annotations

import ast
import importlib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import kvtune
from kvtune.common.transformers_interface import NAMES, TRIED, cache_argument
from kvtune.policies.option import Option
from kvtune.policies.policy import Policy
from kvtune.runtime.cache.policy_cache import PolicyCache
from kvtune.runtime.cache.whole_prompt import when_read

ROOT = Path(kvtune.__file__).parent
PRODUCT = ("cli", "common", "policies", "profiles", "runtime", "simulator", "traces", "tuner")


def imported(source: str) -> Iterator[str]:
    """Full names that a module takes from transformers, by either kind of import."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and str(node.module).split(".")[0] == "transformers":
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Attribute) and ast.unparse(node.value) == "transformers":
            yield f"transformers.{node.attr}"


def test_all_that_the_product_takes_from_transformers_is_listed() -> None:
    files = [file for folder in PRODUCT for file in (ROOT / folder).rglob("*.py")]
    used = {name for file in files for name in imported(file.read_text(encoding="utf-8"))}
    assert used - {"transformers.GgufConfig"} == set(NAMES)  # which not every release has


@pytest.mark.parametrize("name", NAMES)
def test_the_installed_release_has_every_listed_name(name: str) -> None:
    module, _, attribute = name.rpartition(".")
    assert hasattr(importlib.import_module(module), attribute)


def test_the_range_of_releases_begins_with_the_oldest_that_was_tried() -> None:
    declared = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert f'"transformers>={TRIED[0].removesuffix(".0.0")},<6"' in declared


class Old(nn.Module):
    def forward(self, input_ids: Any, past_key_values: Any = None) -> Any:
        return input_ids


class New(nn.Module):
    def forward(self, input_ids: Any, cache: Any = None) -> Any:
        return input_ids


class Unheard(nn.Module):
    def forward(self, input_ids: Any, memory: Any = None) -> Any:
        return input_ids


class Noting:
    """A cache that notes what it was told."""

    def __init__(self) -> None:
        self.told: list[Any] = []

    def read(self, token_ids: Any) -> bool:
        self.told.append(token_ids)
        return False


@pytest.mark.parametrize(("kind", "name"), [(Old, "past_key_values"), (New, "cache")])
def test_the_cache_is_given_under_the_name_that_the_model_takes(kind: Any, name: str) -> None:
    cache = object()
    assert cache_argument(kind(), cache) == {name: cache}


def test_the_installed_release_takes_the_cache_under_that_name(tiny_model: Any) -> None:
    cache = transformers.DynamicCache()
    tiny_model.model(torch.tensor([[5, 6, 7]]), **cache_argument(tiny_model.model, cache))
    assert cache.get_seq_length() == 3


@pytest.mark.parametrize("by_name", [True, False])
@pytest.mark.parametrize(
    ("kind", "name"), [(Old, "past_key_values"), (New, "cache"), (Unheard, "memory")]
)
def test_a_waiting_cache_hears_of_its_prompt_whatever_the_argument_is_called(
    kind: Any, name: str, by_name: bool
) -> None:
    network, cache, other = kind(), Noting(), Noting()
    when_read(SimpleNamespace(base_model=network), cache)
    ids = torch.tensor([[1, 2]])
    for given in (other, cache, cache):
        network(ids, **{name: given}) if by_name else network(ids, given)
    assert len(cache.told) == 1
    assert cache.told[0] is ids
    assert other.told == []


def test_a_layer_answers_about_masks_in_both_forms(tiny_model: Any) -> None:
    policy = Policy.uniform(Option(), 3, 2)
    layer = PolicyCache(policy, tiny_model.geometry).layers[0]
    assert layer.get_mask_sizes(7) == layer.get_mask_sizes(torch.arange(7)) == (7, 0)
    assert layer.get_max_length() == layer.get_max_cache_shape() == -1
