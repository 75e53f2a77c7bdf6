"""Hugging Face transformers: a cache and an attention function, in one file without kvtune."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields, replace
from importlib import resources
from typing import Any

from kvtune.common.transformers_interface import TRIED
from kvtune.policies.export.capacity import bytes_line
from kvtune.policies.export.contract import Export, Exporter, whole_prompts
from kvtune.policies.export.flatten import Heads, planned_heads, reach
from kvtune.policies.export.limits import EngineLimits
from kvtune.policies.export.lines import Line, comment
from kvtune.policies.export.plan import Plan
from kvtune.policies.format import Format
from kvtune.policies.formats.bf16 import Bf16
from kvtune.policies.formats.fp8 import Fp8
from kvtune.policies.formats.grouped import Grouped
from kvtune.policies.method import Method
from kvtune.policies.methods.full import Full
from kvtune.policies.methods.streaming_llm import StreamingLLM
from kvtune.policies.option import ALL, Budget, Option
from kvtune.policies.policy import Policy

_FORMATS = frozenset({"bf16", "fp8", "int8", "int4", "int3", "int2"})
_METHODS = frozenset({"full", "streaming_llm", "snapkv", "h2o"})


@dataclass(frozen=True)
class Transformers(Exporter):
    """A ``Cache`` whose layers keep, per KV head, what the policy says, packed to the bit.

    Stock transformers has no cache with a budget a head. The export brings its own: ``kv_cache.py``
    with a registered attention function (it sees the queries that methods score with) and
    ``kv_cache.json`` with the policy.
    """

    name = "transformers"
    stack = "Hugging Face transformers"
    stack_version = TRIED[-1]
    source = "cache_utils.py, integrations/sdpa_attention.py"
    proof = "ran"
    limits = EngineLimits(_METHODS, _FORMATS, _FORMATS, budgets="head", formats="head")

    def render(self, plan: Plan) -> Export:
        """The module and the policy."""
        taken, losses = self._takeable(plan)
        header = self.header(plan, losses)
        names = {
            option: f"o{number}" for number, option in enumerate(dict.fromkeys(sum(taken, ())))
        }
        policy = {
            "header": header,
            "options": {name: _plain(option) for option, name in names.items()},
            "heads": [[names[option] for option in layer] for layer in taken],
        }
        module = (resources.files("kvtune.policies.export") / "exported_cache.py").read_text(
            "utf-8"
        )
        files = {"kv_cache.py": comment(header) + module, "kv_cache.json": _json(policy)}
        weights = f"load the model with {plan.weights} weights, as the plan assumed."
        notes = (*_NOTES, weights) if plan.weights else _NOTES
        size = type(plan.policy)("taken", taken).footprint(plan.context_tokens, plan.facts.head_dim)
        return self.done(plan, files, losses, [bytes_line(plan, size)], notes, (size, None, 0))

    def runs(self, plan: Plan) -> Policy | None:
        """Known where every head keeps all tokens in 16 bits."""
        stored = {
            (reach(option, plan.context_tokens).shape, option.keys, option.values)
            for option in sum(self._takeable(plan)[0], ())
        }
        return whole_prompts(plan.facts) if stored == {("all", Bf16(), Bf16())} else None

    def _takeable(self, plan: Plan) -> tuple[Heads, list[Line]]:
        """The options as the module can run them."""
        report: dict[Line, None] = {}
        allocated, line = planned_heads(plan)
        report[line] = None
        rows = tuple(tuple(self._option(option, report) for option in layer) for layer in allocated)
        return rows, list(report)

    def _option(self, option: Option, report: dict[Line, None]) -> Option:
        method, budget = self._method(option.method, option.budget, report)
        keys = self._format(option.keys, "keys", report)
        return Option(method, budget, keys, self._format(option.values, "values", report))

    def _method(
        self, method: Method, budget: Budget, report: dict[Line, None]
    ) -> tuple[Method, Budget]:
        if isinstance(method, StreamingLLM) and method.positions != "kept":
            detail = "keys stay at the positions that they were computed at"
            report[Line(f"method {method.label}", "approximated", detail)] = None
            return replace(method, positions="kept"), budget
        if method.name in _METHODS:
            report[Line(f"method {method.name}", "kept", "each KV head, its budget exactly")] = None
            return method, budget
        detail = "kv_cache.py does not know it; dropped, all tokens stay"
        report[Line(f"method {method.name}", "not expressible", detail)] = None
        return Full(), ALL

    def _format(self, form: Format, role: str, report: dict[Line, None]) -> Format:
        if isinstance(form, (Bf16, Fp8, Grouped)):
            how = "16 bits" if isinstance(form, Bf16) else "packed, the same groups and scales"
            report[Line(f"{role} {form.label}", "kept", how)] = None
            return form
        detail = "kv_cache.py does not know it; used 16 bits instead"
        report[Line(f"{role} {form.label}", "not expressible", detail, wider=True)] = None
        return Bf16()


_NOTES = (
    "import kv_cache; kv_cache.apply(model); "
    "model.generate(**inputs, past_key_values=kv_cache.build_cache()), or cache= from 5.24",
    "prompts without padding, one cache a generate; no beam search; sdpa attention is used.",
    "stored tokens are read back at every step: memory is saved, time is not.",
)


def _plain(option: Option) -> dict[str, Any]:
    return {
        "method": _parameters(option.method),
        "budget": _plain_budget(option.budget),
        "keys": _parameters(option.keys),
        "values": {k: v for k, v in _parameters(option.values).items() if k != "keys_by"},
    }


def _plain_budget(budget: Budget) -> int | float | list[float] | None:
    """Tokens, a share, a share and the tokens that it keeps at least, or None for all."""
    if budget.tokens is not None or not budget.floor:
        return budget.tokens if budget.tokens is not None else budget.share
    return [float(budget.share or 0), budget.floor]


def _parameters(thing: Method | Format) -> dict[str, Any]:
    stated = {"bits": thing.bits} if isinstance(thing, Grouped) else {}
    return {"name": thing.name, **stated, **{f.name: getattr(thing, f.name) for f in fields(thing)}}


def _json(policy: dict[str, Any]) -> str:
    """One line an option and a layer, so that a diff can be read."""

    def block(lines: list[str], ends: str) -> str:
        return ends[0] + "\n    " + ",\n    ".join(lines) + "\n  " + ends[1]

    options = [f"{json.dumps(k)}: {json.dumps(v)}" for k, v in policy["options"].items()]
    heads = [json.dumps(row) for row in policy["heads"]]
    header = [json.dumps(line) for line in policy["header"]]
    return (
        f'{{\n  "header": {block(header, "[]")},\n  "options": {block(options, "{}")},\n'
        f'  "heads": {block(heads, "[]")}\n}}\n'
    )
