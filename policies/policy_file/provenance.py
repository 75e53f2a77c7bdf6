"""Reads where a policy came from: what it was searched on, and what it is expected to lose."""

from __future__ import annotations

from typing import Any, Literal, get_args

from kvtune.common.estimate import Estimate, Tier
from kvtune.common.yaml_tree import Node
from kvtune.policies.policy_file.checker import Checker
from kvtune.policies.policy_file.parts import Provenance, Quality


def read_provenance(check: Checker, node: Node) -> Provenance | None:
    """The section; None where it has mistakes, which are noted."""
    known = ("quality", "kvtune", "trace", "seed", "memory", "latency", "other_lengths")
    entries = check.mapping(node, known)
    values: dict[str, Any] = {}
    for key, entry in entries.items():
        if key == "quality":
            values[key] = _quality(check, entry)
        elif key in ("memory", "latency", "other_lengths"):
            values[key] = _figures(check, entry)
        else:
            values[key] = check.value(entry, int if key == "seed" else str)
    return None if check.problems else Provenance(**values)


def _figures(check: Checker, node: Node) -> Any:
    """Free figures; only their amount is bounded."""
    if node.size() > 10_000:
        check.problem(node, "holds more than 10000 values")
        return None
    check.mapping(node)
    return node.plain()


def _quality(check: Checker, node: Node) -> Quality | None:
    keys = ("source", "stand_in", "stack", "kl_nats_per_token", "interval", "tier")
    entries = check.mapping(node, keys, required=["source"])
    before = len(check.problems)
    kinds: dict[str, Any] = {
        "source": Literal["own trace", "stand-in"], "stand_in": str, "stack": str,
        "kl_nats_per_token": float, "tier": Literal[get_args(Tier)],
    }  # fmt: skip
    read = {key: check.value(entry, kinds[key]) for key, entry in entries.items() if key in kinds}
    if read.get("source") == "stand-in" and not read.get("stand_in"):
        check.problem(node, "a stand-in must be named: the key 'stand_in' is missing")
    loss = _loss(check, node, entries, read)
    if len(check.problems) > before or "source" not in read:
        return None
    return Quality(read["source"], read.get("stand_in") or "", loss, read.get("stack") or "")


def _loss(
    check: Checker, node: Node, entries: dict[str, Node], read: dict[str, Any]
) -> Estimate | None:
    given = [key for key in ("kl_nats_per_token", "interval", "tier") if key in entries]
    if not given:
        return None
    if len(given) < 3:
        check.problem(node, "a KL figure needs kl_nats_per_token, interval and tier")
        return None
    ends = [check.value(end, float) for end in check.sequence(entries["interval"])]
    if len(ends) != 2 or None in ends or ends[0] > ends[1]:
        check.problem(entries["interval"], "must be [low, high]")
        return None
    return Estimate(read["kl_nats_per_token"], ends[0], ends[1], "nats/token", read["tier"])
