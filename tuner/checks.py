"""Mistakes in what a search is asked, found before anything that takes seconds is imported."""

from __future__ import annotations

from kvtune.common.errors import KvtuneError
from kvtune.policies.head_scores import Floats, read_heads
from kvtune.policies.policy_file.document import read_policy
from kvtune.simulator.memory.weights import listed_formats
from kvtune.tuner.engines import check_engine
from kvtune.tuner.request import SearchRequest
from kvtune.tuner.shared_study import check_storage


def check_request(request: SearchRequest) -> None:
    """Refuse what no search could be made of; files that it names are opened and read.

    Raises:
        KvtuneError: an unknown weight format, engine or storage, layers that cannot be planned, a
            number of sequences below the limit on it, lengths to run a plan at without weights,
            or a policy or scores that are damaged or made for another model.
    """
    _check_layers(request)
    _check_sequences(request)
    listed_formats(request.weights, request.shape, request.gpu)
    if request.engine is not None:
        check_engine(request.engine)
    if request.storage is not None:
        check_storage(request.storage)
    for start in request.starts:
        read_policy(start).bind(request.shape.layers, request.shape.kv_heads)
    if request.starts and not request.has_weights:
        raise no_head_is_known(request)
    if request.lengths and not request.has_weights:
        raise KvtuneError(
            f"--lengths runs the plan on other prompts, and no weights of {request.shape.name} are "
            "at hand",
            hint="give the model's weights (--model PATH), or leave out --lengths.",
        )
    if request.heads is not None:
        scores_of(request)


def _check_layers(request: SearchRequest) -> None:
    longest = request.contexts[-1] + request.generated_tokens
    if not request.shape.keeps_all(longest):
        raise KvtuneError(
            f"{request.shape.name} has sliding-window, latent, recurrent or unequal layers, "
            "which search cannot plan yet",
            hint="kvtune estimate tells what its uncompressed cache takes; contexts that are no "
            "longer than the window can be planned.",
        )


def _check_sequences(request: SearchRequest) -> None:
    planned, least = request.sequences, request.limits.sequences
    if planned is not None and least is not None and planned < least:
        raise KvtuneError(
            f"--batch {planned} plans for exactly that many sequences at once, and --sequences "
            f"{least} asks for more",
            hint=f"give --sequences {least} alone, or --batch {least}.",
        )


def no_head_is_known(request: SearchRequest) -> KvtuneError:
    """The error for plans to begin with, where a stand-in's heads are no heads of this model."""
    return KvtuneError(
        f"{request.starts[0].name} gives heads options of their own, and of "
        f"{request.shape.name} no head's loss is known",
        hint="give the model's weights (--model PATH), or leave out --start.",
    )


def scores_of(request: SearchRequest) -> Floats:
    """The scores of the request's file by layer and KV head, ``[L, H]``.

    Raises:
        KvtuneError: no such file, or the scores of another model.
    """
    assert request.heads is not None  # noqa: S101 - it is asked of requests that name a file
    heads, shape = read_heads(request.heads), request.shape
    name = "retrieval" if "retrieval" in heads.scores else sorted(heads.scores)[0]
    scores = heads.of_kv_heads(name, shape.kv_heads)
    if len(scores) != shape.layers:
        raise KvtuneError(
            f"has scores of {len(scores)} layers, {shape.name} has {shape.layers}",
            where=str(request.heads),
            hint="kvtune heads detect measures this model's.",
        )
    return scores
