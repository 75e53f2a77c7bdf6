"""Writes a policy file: the same text for the same document, laid out to be edited by hand."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from decimal import Decimal
from typing import Any

from kvtune.common.yaml_tree import flow
from kvtune.policies.option import Budget, Option
from kvtune.policies.policy_file.parts import (
    VERSION,
    WITHOUT_FLOORS,
    Pattern,
    PolicyDocument,
    Provenance,
)

HEADER = """\
# A KV-cache policy for kvtune: which prompt tokens each KV head keeps, and how they are stored.
# Edit it freely: kvtune simulate checks it, and names the line of every mistake. What it loses is
# not known then; kvtune validate measures it. The same search keeps it as policy.edited.yaml.
#   options    method (which tokens), budget (how many: 256, 12.5% of the prompt, 12.5% but at least
#              224 tokens, or all), and the format of keys and values; a name alone, or
#              {name: ..., parameter: ...}.
#              tier: host keeps the prompt in the host's memory, from where steps fetch it.
#              What is left out is: method full, budget all, keys bf16, values bf16, tier device.
#   policy     one option everywhere; layers: {0: a, 5: [a, b, a]} then names exceptions.
#   heads      instead of policy: one line a layer, one option a KV head.
#   allocator  may move budgets between heads: as_given, or {name: pyramid, beta: 20}.
# kvtune policies lists methods, formats, allocators and their parameters.
"""


def write_policy(document: PolicyDocument) -> str:
    """The text of a policy file; ``read_policy`` gives the same document back."""
    return HEADER + _quality_line(document) + "\n".join(_lines(document)) + "\n"


def as_plain(document: PolicyDocument) -> dict[str, Any]:
    """The document as dicts, lists and scalars: what the YAML holds, for JSON."""
    names = _option_names(document)
    floors = any(option.budget.floor for option in names)
    plain: dict[str, Any] = {"kvtune_policy": VERSION if floors else WITHOUT_FLOORS}
    if document.policy.name:
        plain["name"] = document.policy.name
    for key in ("model", "serving"):
        if (part := getattr(document, key)) is not None:
            plain[key] = _set_fields(part)
    if document.provenance is not None:
        plain["provenance"] = _provenance(document.provenance)
    plain["allocator"] = component(document.policy.allocator)
    plain["options"] = {name: _option(option) for option, name in names.items()}
    return plain | _assignment(document, names)


def _assignment(document: PolicyDocument, names: dict[Option, str]) -> dict[str, Any]:
    policy = document.policy
    if not isinstance(policy, Pattern):
        return {"heads": [[names[option] for option in layer] for layer in policy.heads]}
    plain: dict[str, Any] = {"policy": names[policy.option]}
    if policy.layers:
        plain["layers"] = {
            str(layer): names[options[0]] if len(options) == 1 else [names[o] for o in options]
            for layer, options in policy.layers
        }
    return plain


def _option_names(document: PolicyDocument) -> dict[Option, str]:
    """Letters in the order of first use."""
    policy = document.policy
    if isinstance(policy, Pattern):
        used = [policy.option, *(option for _, options in policy.layers for option in options)]
    else:
        used = list(policy.options())
    return {option: _letters(index) for index, option in enumerate(dict.fromkeys(used))}


def _letters(index: int) -> str:
    """a, b, ..., z, aa, ab, ...; never a word that YAML reads otherwise (on, no)."""
    head, tail = divmod(index, 26)
    return (_letters(head - 1) if head else "") + chr(ord("a") + tail)


def component(thing: Any) -> Any:
    """A method, format or allocator: its name, with the parameters that are not the default."""
    changed = {
        each.name: getattr(thing, each.name)
        for each in fields(thing)
        if getattr(thing, each.name) != each.default
    }
    return {"name": thing.name, **changed} if changed else thing.name


def budget_text(budget: Budget) -> int | str:
    """256, ``12.5%``, ``12.5% but at least 224 tokens`` or ``all``; exact, unlike the label."""
    if budget.tokens is not None:
        return budget.tokens
    if budget.share is None:
        return "all"
    percent = Decimal(repr(budget.share)).scaleb(2)
    text = format(percent, "f")
    share = (text.rstrip("0").rstrip(".") if "." in text else text) + "%"
    return f"{share} but at least {budget.floor} tokens" if budget.floor else share


def _option(option: Option) -> dict[str, Any]:
    plain = {
        "method": component(option.method),
        "budget": budget_text(option.budget),
        "keys": component(option.keys),
        "values": component(option.values),
    }
    return plain | ({"tier": option.tier} if option.on_host else {})


def _set_fields(part: Any) -> dict[str, Any]:
    """The fields that say something."""
    found = {each.name: getattr(part, each.name) for each in fields(part)}
    return {key: value for key, value in found.items() if value not in (None, "", {})}


def _provenance(provenance: Provenance) -> dict[str, Any]:
    plain = _set_fields(provenance)
    if (quality := provenance.quality) is not None:
        plain["quality"] = {"source": quality.source}
        for key in ("stand_in", "stack"):
            if value := getattr(quality, key):
                plain["quality"][key] = value
        if (loss := quality.kl_nats_per_token) is not None:
            plain["quality"] |= {
                "kl_nats_per_token": loss.value,
                "interval": [loss.low, loss.high],
                "tier": loss.tier,
            }
    return plain


def _quality_line(document: PolicyDocument) -> str:
    quality = document.provenance.quality if document.provenance else None
    return f"# quality: {quality}\n" if quality else ""


def _lines(document: PolicyDocument) -> Iterator[str]:
    plain = as_plain(document)
    for key, value in plain.items():
        if key in ("options", "layers", "provenance") and value:
            yield f"{key}:"
            for name, entry in value.items():
                yield f"  {flow(name)}: {flow(entry)}"
        elif key == "heads":
            yield "heads:"
            for layer, row in enumerate(value):
                yield f"  - {flow(row)}  # layer {layer}"
        else:
            yield f"{key}: {flow(value)}"
