"""A search that has finished: the same question is answered from its run directory."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import kvtune
from kvtune.common.bounds import Digest
from kvtune.common.errors import KvtuneError
from kvtune.common.files import inside, sha256, write_json
from kvtune.common.stored import checked, read_json
from kvtune.policies.policy import Policy
from kvtune.policies.policy_file.document import read_policy
from kvtune.simulator.memory.plan import MemoryPlan
from kvtune.simulator.memory.weights import check_format
from kvtune.tuner.config_file import check_run
from kvtune.tuner.edited import FINISHED
from kvtune.tuner.explore import PLANS_FILE
from kvtune.tuner.request import SearchRequest
from kvtune.tuner.result import SearchResult
from kvtune.tuner.source_models import digests
from kvtune.tuner.stored_result import StoredResult, read_result

if TYPE_CHECKING:
    from kvtune.tuner.timing import Times

RESULT = "result.json"


def fingerprint(request: SearchRequest) -> str:
    """Hash of all that decides a search's answer; another folder or engine is no other question."""
    asked = asdict(replace(request, run_dir=Path(), engine=None))
    contents = [sha256(path) for path in (*request.texts, *request.starts)]
    parts = [asked, contents, _weights(request.model), digests(), kvtune.__version__]
    return hashlib.sha256(json.dumps(parts, default=str, sort_keys=True).encode()).hexdigest()


def _weights(model: str) -> list[tuple[str, int, int]]:
    """Name, size and time of change of the model's files, where it is named by a path."""
    path = Path(model).expanduser()
    files = [path] if path.is_file() else sorted(path.glob("*")) if path.is_dir() else []
    stats = [(file.name, file.stat()) for file in files if file.is_file()]
    return [(name, about.st_size, about.st_mtime_ns) for name, about in stats]


@dataclass(frozen=True)
class Finished:
    """``finished.json``: which question a run directory answers, and its files as they were left.

    Args:
        format: of this file.
        asked: fingerprint of the question.
        files: sha256 of the result and of every policy.
        times: what ``result.json`` does not hold: the plan timed on this machine's GPU, or None.
        untimed: why it was not, or None.
    """

    format: Literal[1]
    asked: Digest
    files: dict[str, Digest]
    times: dict[str, Any] | None
    untimed: str | None


def keep_finished(result: SearchResult) -> None:
    """Note, after all files that make up the answer, what the run directory answers."""
    folder = result.request.run_dir
    plain = {
        "format": 1,
        "asked": fingerprint(result.request),
        "files": {name: sha256(folder / name) for name in (RESULT, *result.policies)},
        "times": _times_as_plain(result.times),
        "untimed": result.untimed,
    }
    write_json(folder / FINISHED, plain)


def finished(request: SearchRequest) -> SearchResult | None:
    """The answer that the run directory holds; None of another question, or of an unfinished one.

    A file that was edited since makes it unfinished: all are then written anew.

    Raises:
        KvtuneError: ``finished.json`` or ``config.json`` is damaged.
    """
    folder = request.run_dir
    path = folder / FINISHED
    if not (path.is_file() and (folder / PLANS_FILE).is_file()):
        return None
    ended = checked(Finished, read_json(path), str(path))
    check_run(folder)
    if ended.asked != fingerprint(request) or not _untouched(folder, ended):
        return None
    return _restored(request, ended)


def answers_another(request: SearchRequest) -> bool:
    """Whether a search that is no answer to this request has ended in its folder."""
    return (request.run_dir / FINISHED).is_file() and finished(request) is None


def _untouched(folder: Path, ended: Finished) -> bool:
    """Whether all files are there, as the search has written them."""
    try:
        return all(sha256(inside(folder, name)) == hash_ for name, hash_ in ended.files.items())
    except (OSError, KvtuneError):
        return False


def _restored(request: SearchRequest, ended: Finished) -> SearchResult:
    path = request.run_dir / RESULT
    stored, where = read_result(path), str(path)
    files = [each.policy for each in stored.baselines if each.policy is not None]
    policies = {name: _policy(request, name) for name in files}
    if stored.policy not in policies:
        raise KvtuneError("this result cannot be read: it has no plan", where=where)
    return SearchResult(
        request=request,
        budget=_memory(request, stored, where),
        policy=policies[stored.policy],
        policies=policies,
        times=_times(ended.times, where),
        untimed=ended.untimed,
        **stored.figures,
    )


def _policy(request: SearchRequest, name: str) -> Policy:
    document = read_policy(inside(request.run_dir, name))
    return document.bind(request.shape.layers, request.shape.kv_heads)


def _memory(request: SearchRequest, stored: StoredResult, where: str) -> MemoryPlan:
    """What does not follow from the request is read, and the rest must be as it was."""
    known = MemoryPlan(
        request.shape,
        request.gpu,
        request.memory_bytes,
        check_format(str(stored.budget.get("weight_format"))),
        str(stored.budget.get("reason")),
        stored.context_tokens,
        request.generated_tokens,
        stored.sequences,
    )
    if json.loads(json.dumps(known.as_dict())) != stored.budget:
        raise KvtuneError("this result cannot be read: its memory is another model's", where=where)
    return known


def _times_as_plain(times: Times | None) -> Any:
    if times is None:
        return None
    from pydantic import TypeAdapter

    from kvtune.tuner.timing import Times

    return TypeAdapter(Times).dump_python(times, mode="json")


def _times(stored: dict[str, Any] | None, where: str) -> Any:
    if stored is None:
        return None
    from kvtune.tuner.timing import Times

    return checked(Times, stored, where)
