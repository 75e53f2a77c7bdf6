"""Reads a policy file: strict, every mistake with its line."""

from __future__ import annotations

import re
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

from kvtune.common.errors import KvtuneError
from kvtune.common.yaml_tree import LARGEST_FILE, Node, parse
from kvtune.policies.allocator import Allocator, allocators
from kvtune.policies.allocators.as_given import AsGiven
from kvtune.policies.format import formats
from kvtune.policies.method import Method, methods
from kvtune.policies.option import ALL, Budget, MemoryTier, Option
from kvtune.policies.policy import Policy
from kvtune.policies.policy_file.checker import Checker, PolicyFileError
from kvtune.policies.policy_file.parts import (
    VERSION,
    WITHOUT_FLOORS,
    ModelFacts,
    Pattern,
    PolicyDocument,
    Provenance,
    Serving,
)
from kvtune.policies.policy_file.provenance import read_provenance

T = TypeVar("T")
_LARGEST_SHAPE = 4096  # layers, or KV heads: bounds what aliases can stand for
_PERCENT = re.compile(r"([0-9]+(?:\.[0-9]+)?) ?%(?: but at least ([1-9][0-9]{0,8}) tokens)?")
_KEYS = (
    "kvtune_policy", "name", "model", "provenance", "serving",
    "options", "allocator", "policy", "layers", "heads",
)  # fmt: skip

_FACTS = ("name", "layers", "kv_heads", "head_dim")
_MODEL_HINT = (
    "kvtune models lists them; 'model' may also be left out and said by --model, since a 'policy' "
    "fits any shape."
)
_WHOLE = (
    *_FACTS[1:], "max_context", "context_tokens", "generated_tokens", "batch", "cache_bytes",
)  # fmt: skip


def read_policy(source: Path | str) -> PolicyDocument:
    """The document in a file, or in a text of several lines or of JSON.

    Raises:
        KvtuneError: no such file, or mistakes in it (``PolicyFileError`` with all of them).
    """
    if isinstance(source, str) and ("\n" in source or source.lstrip().startswith("{")):
        return _read(source, "policy")
    return _read(_text_of(Path(source)), str(source))


def _text_of(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return file.read(4 * LARGEST_FILE + 1).decode("utf-8")
    except OSError as error:
        hint = "kvtune search writes a policy file; see also kvtune policies."
        raise KvtuneError(f"cannot read: {error.strerror}", where=str(path), hint=hint) from error
    except UnicodeDecodeError as error:
        raise KvtuneError("this is no text file (UTF-8)", where=str(path)) from error


def _read(text: str, file: str) -> PolicyDocument:
    root = parse(text, file)
    check = Checker()
    document = _Reader(check, root).document()
    if check.problems or document is None:
        raise PolicyFileError(file, check.problems)
    return document


class _Reader:
    """One file's parts, in the order in which they depend on each other."""

    def __init__(self, check: Checker, root: Node) -> None:
        self.check = check
        self.root = root
        first = f"a policy file says its version: kvtune_policy: {WITHOUT_FLOORS}"
        self.entries = check.mapping(root, _KEYS, ["kvtune_policy"], first)
        self.options: dict[str, Option | None] = {}

    def document(self) -> PolicyDocument | None:
        if not self.version():
            return None
        model = self.part("model", ModelFacts, _FACTS, _MODEL_HINT)
        for name, node in self.entries_of("options").items():
            self.options[name] = self.option(node)
        policy = self.policy(model)
        self.allocator_suits(policy)
        provenance, serving = self.provenance(), self.part("serving", Serving)
        if policy is None or self.check.problems:
            return None
        return PolicyDocument(policy, model, provenance, serving)

    def version(self) -> bool:
        node = self.entries.get("kvtune_policy")
        version = None if node is None else self.check.value(node, int, low=1)
        if node is not None and version is not None and version > VERSION:
            self.check.problem(
                node,
                f"this file is of version {version}, this kvtune reads up to {VERSION}",
                "update kvtune, or write the file again with this one.",
            )
            self.check.problems = self.check.problems[-1:]
            return False
        return True

    def entries_of(self, key: str) -> dict[str, Node]:
        return self.check.mapping(self.entries[key]) if key in self.entries else {}

    def part(
        self, key: str, kind: type[T], required: tuple[str, ...] = (), hint: str | None = None
    ) -> T | None:
        """A section whose keys are the fields of a dataclass of scalars."""
        if key not in self.entries:
            return None
        before = len(self.check.problems)
        known = {
            name: int if name in _WHOLE else str
            for name in kind.__dataclass_fields__  # type: ignore[attr-defined]
        }
        entries = self.check.mapping(self.entries[key], known, required, hint)
        values = {
            name: self.check.value(entry, known[name], low=1) for name, entry in entries.items()
        }
        return kind(**values) if len(self.check.problems) == before else None

    def option(self, node: Node) -> Option | None:
        before = len(self.check.problems)
        entries = self.check.mapping(node, ("method", "budget", "keys", "values", "tier"))
        parts: dict[str, Any] = {}
        for key, kinds, what in (
            ("method", methods(), "method"), ("keys", formats(), "format"),
            ("values", formats(), "format"),
        ):  # fmt: skip
            if key in entries:
                parts[key] = self.check.component(entries[key], kinds, what)
        if "budget" in entries:
            parts["budget"] = self.budget(entries["budget"])
            self.keeps_something(entries["budget"], parts["budget"], parts.get("method"))
        if "tier" in entries:
            parts["tier"] = self.check.value(entries["tier"], Literal[get_args(MemoryTier)])
        return Option(**parts) if len(self.check.problems) == before else None

    def budget(self, node: Node) -> Budget | None:
        value = node.value
        if type(value) is int and value >= 0:
            return Budget(tokens=value)
        if value == "all":
            return ALL
        percent = _PERCENT.fullmatch(value) if isinstance(value, str) else None
        share = Decimal(percent[1]).scaleb(-2) if percent else Decimal(0)
        if 0 < share <= 1:
            return Budget(share=float(share), floor=int((percent and percent[2]) or 0))
        hint = (
            "write tokens (256), a share of the prompt (12.5%, or 12.5% but at least 224 tokens) "
            "or all."
        )
        if isinstance(value, float) and 0 < value <= 1:
            hint = f"a share is written with a percent sign: {100 * value:g}%."
        self.check.problem(node, f"{node.plain()!r} is no budget"[:100], hint)
        return None

    def keeps_something(self, node: Node, budget: Budget | None, method: Method | None) -> None:
        """Refuse 0 tokens but of a method that holds the others too, shared by two layers."""
        if budget is None or budget.tokens != 0:
            return
        if method and sum(part.entries for part in method.plan(0, 1024)):
            return
        hint = "write at least 1 token (256), a share of the prompt (12.5%), or all."
        self.check.problem(node, "budget 0: nothing of the prompt would stay", hint)

    def policy(self, model: ModelFacts | None) -> Policy | Pattern | None:
        forms = [key for key in ("policy", "heads") if key in self.entries]
        if len(forms) != 1:
            self.check.problem(
                self.root,
                "a policy needs 'policy' (one option everywhere) or 'heads' (one a head)"
                + (", not both" if forms else ""),
            )
            return None
        allocator: Allocator | None = AsGiven()
        if "allocator" in self.entries:
            allocator = self.check.component(self.entries["allocator"], allocators(), "allocator")
        name = self.check.value(self.entries["name"], str) if "name" in self.entries else ""
        if forms == ["heads"]:
            return self.heads(name or "policy", allocator or AsGiven(), model)
        return self.pattern(name or "", allocator or AsGiven(), model)

    def allocator_suits(self, policy: Policy | Pattern | None) -> None:
        """Whether the allocator can compare the methods of the heads."""
        if policy is None or self.check.problems:
            return
        try:
            policy.check_allocator()
        except KvtuneError as error:
            self.check.problem(self.entries["allocator"], error.message, error.hint)

    def chosen(self, node: Node) -> Option | None:
        """The option that a head's entry names."""
        name = self.check.name(node, self.options, "option")
        return self.options[name] if name is not None else None

    def heads(self, name: str, allocator: Allocator, model: ModelFacts | None) -> Policy | None:
        if "layers" in self.entries:
            self.check.problem(self.entries["layers"], "stands only beside 'policy', not 'heads'")
        rows = self.check.sequence(self.entries["heads"])
        widths = [len(row.value) if isinstance(row.value, list) else 0 for row in rows]
        if not rows or max(len(rows), *widths) > _LARGEST_SHAPE:
            self.check.problem(
                self.entries["heads"], f"needs 1 to {_LARGEST_SHAPE} layers and heads"
            )
            return None
        width = model.kv_heads if model else widths[0]
        if model and len(rows) != model.layers:
            message = f"{len(rows)} layers are given, {model.name!r} has {model.layers}"
            self.check.problem(self.entries["heads"], message)
        chosen = [tuple(self.chosen(node) for node in self.check.sequence(row)) for row in rows]
        for row, options in zip(rows, chosen, strict=True):
            if isinstance(row.value, list) and (len(options) != width or not options):
                whose = f"{model.name!r} has" if model else "the first layer has"
                self.check.problem(row, f"{len(options)} options, {whose} {width} KV heads")
        complete = tuple(tuple(o for o in row if o is not None) for row in chosen)
        return Policy(name, complete, allocator)

    def pattern(self, name: str, allocator: Allocator, model: ModelFacts | None) -> Pattern | None:
        node = self.entries["policy"]
        option = self.chosen(node) if isinstance(node.value, str) else self.option(node)
        layers = sorted(
            (int(key), self.exception(entry, model))
            for key, entry in self.entries_of("layers").items()
            if self.layer_index(key, entry, model)
        )
        return Pattern(option, tuple(layers), allocator, name) if option else None

    def layer_index(self, key: str, entry: Node, model: ModelFacts | None) -> bool:
        if not re.fullmatch(r"0|[1-9][0-9]{0,4}", key):
            self.check.problem(entry, f"{key!r} is no layer: they are numbered from 0")
            return False
        if model and int(key) >= model.layers:
            last = model.layers - 1
            self.check.problem(entry, f"{model.name!r} has the layers 0 to {last}")
        return True

    def exception(self, node: Node, model: ModelFacts | None) -> tuple[Option, ...]:
        """One layer's options: one for all heads, or a list of one a head."""
        nodes = node.value if isinstance(node.value, list) else [node]
        if not nodes or len(nodes) > _LARGEST_SHAPE:
            self.check.problem(node, "needs one option, or one a KV head")
            return ()
        chosen = [self.chosen(each) for each in nodes]
        if model and len(nodes) not in (1, model.kv_heads):
            message = f"{len(nodes)} options, {model.name!r} has {model.kv_heads} KV heads"
            self.check.problem(node, message)
        return tuple(option for option in chosen if option is not None)

    def provenance(self) -> Provenance | None:
        node = self.entries.get("provenance")
        return None if node is None else read_provenance(self.check, node)
