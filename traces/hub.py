"""A model of the Hugging Face Hub: its revision pinned, its size said before it is fetched."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypedDict

from kvtune.common.errors import KvtuneError
from kvtune.common.progress import Progress
from kvtune.common.units import format_bytes

if TYPE_CHECKING:
    from huggingface_hub.hf_api import ModelInfo

WANTED = ("*.json", "*.safetensors", "*.model", "*.tiktoken", "*.txt", "*.jinja")
"""Configuration, tokenizer and weights; never a pickle."""
CODE = "*.py"
"""The model's own code, where it is trusted."""
AGAIN = ("*/*", "consolidated*.safetensors", "model.fp16*.safetensors")
"""The same weights for other loaders, which may lie in folders of their own."""
_PATIENCE_S = 10


class Patterns(TypedDict):
    """Which files are fetched, as the Hub's library asks for it."""

    allow_patterns: list[str]
    ignore_patterns: list[str]


def parts_of(name: str) -> tuple[str, str | None]:
    """``owner/name`` and the revision behind an ``@``, if there is one."""
    repository, _, revision = name.partition("@")
    return repository, revision or None


def hub_folder(name: str, progress: Progress, *, trust_remote_code: bool = False) -> str:
    """The folder that a model's files lie in; what is missing is fetched, after its size is said.

    Args:
        name: ``owner/name`` or ``owner/name@revision``; without one it is the newest, whose hash
            is said, so that the same can be asked for again.
        progress: is told.
        trust_remote_code: fetch the model's own code too.

    Raises:
        KvtuneError: there is no such model, or the Hub is not reached and it is not in its cache.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # also of no route

    repository, revision = parts_of(name)
    chosen = _chosen(trust_remote_code)
    try:
        about = HfApi().model_info(
            repository, revision=revision, files_metadata=True, timeout=_PATIENCE_S
        )
        if size := _missing_bytes(repository, about, chosen):
            progress.note(
                f"fetching {format_bytes(size)} of {repository}@{about.sha} from the Hub; "
                f"--model {repository}@{about.sha} pins this revision"
            )
        # By the name that was asked for, so that the cache knows it without the Hub.
        return snapshot_download(repository, revision=revision, **chosen)
    except (HTTPError, OSError, ValueError) as error:
        return _in_cache(repository, revision, chosen, error)


def _chosen(trust_remote_code: bool) -> Patterns:
    """Which files of a repository are fetched."""
    wanted = [*WANTED, CODE] if trust_remote_code else [*WANTED]
    return {"allow_patterns": wanted, "ignore_patterns": [*AGAIN]}


def _missing_bytes(repository: str, about: ModelInfo, chosen: Patterns) -> int:
    """Bytes of the files that are wanted and not in the Hub's cache."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.utils import filter_repo_objects  # type: ignore[attr-defined]

    sizes = {file.rfilename: file.size or 0 for file in about.siblings or []}
    return sum(
        sizes[file]
        for file in filter_repo_objects(sizes, **chosen)
        if not isinstance(try_to_load_from_cache(repository, file, revision=about.sha), str)
    )


def _in_cache(repository: str, revision: str | None, chosen: Patterns, error: Exception) -> str:
    """What an earlier run has fetched, where the Hub cannot be reached."""
    from huggingface_hub import snapshot_download

    try:
        return snapshot_download(repository, revision=revision, local_files_only=True, **chosen)
    except (OSError, ValueError):
        said = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise KvtuneError(
            f"the model cannot be fetched from the Hub: {said}",
            where=repository if revision is None else f"{repository}@{revision}",
            hint="check its name, the revision and the network, or give a folder with its weights.",
        ) from error
