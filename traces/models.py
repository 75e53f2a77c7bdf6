"""Loading a model for capture and for live runs: by known name, folder, Hub id or GGUF file."""

from __future__ import annotations

import contextlib
import gc
import hashlib
import importlib.metadata
import io
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvtune.common.errors import KvtuneError, nearest
from kvtune.common.files import sha256
from kvtune.common.progress import Progress, Silent
from kvtune.common.transformers_interface import gguf_read_once, unpacked_gguf
from kvtune.traces import seam, store
from kvtune.traces.geometry import Geometry, check_shapes, read_geometry
from kvtune.traces.hub import hub_folder
from kvtune.traces.self_check import Ask, Part, require_same, set_attention

if TYPE_CHECKING:
    from torch import Tensor

KNOWN = ("smollm2-135m",)
DTYPES = ("bfloat16", "float16", "float32")

_FINGERPRINT_VALUES = 4096
_SMALLEST_NORMAL_FP16 = 2.0**-14


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to run through the attention seam, and what is known about it.

    Args:
        model: transformers causal language model, in eval mode, no parameter needs a gradient.
        tokenizer: its tokenizer.
        name: the name or path that it was asked for by.
        fingerprint: sha256 of geometry and weights; the same for bf16 and fp32 copies.
        geometry: layers, heads, head_dim, windows, RoPE.
        device: ``cpu`` or ``cuda:0``.
        dtype: ``bfloat16``, ``float16`` or ``float32``.
        dtype_reason: one sentence that says why this dtype.
    """

    model: Any
    tokenizer: Any
    name: str
    fingerprint: str
    geometry: Geometry
    device: str
    dtype: str
    dtype_reason: str


def load_model(
    name_or_path: str | Path,
    *,
    device: str = "cpu",
    dtype: str | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> LoadedModel:
    """Load a model with kvtune's attention seam.

    Args:
        name_or_path: ``smollm2-135m``, a Hugging Face folder, a ``.gguf`` file or a Hub id, with a
            revision behind ``@``.
        device: ``cpu``, ``cuda`` or ``cuda:1``.
        dtype: one of ``DTYPES``; None chooses one and says why.
        trust_remote_code: let a model folder run its own code; off unless asked.
        progress: is told about slow steps.

    Raises:
        KvtuneError: unknown name, unreadable files, no such device, unknown dtype.
    """
    progress = progress or Silent()
    with _not_collecting():
        device = _device(device)
        dtype, reason = choose_dtype(device, dtype)
        seam.register()
        name = str(name_or_path)
        folder = model_folder(name, progress, trust_remote_code=trust_remote_code)
        model, tokenizer = _read(folder, dtype, device, trust_remote_code)
        return wrap(model, tokenizer, name=name, dtype_reason=reason)


@contextlib.contextmanager
def _not_collecting() -> Iterator[None]:
    """Pause Python's search for garbage cycles: importing transformers makes objects by the million
    that all stay, and looking through them again and again took a quarter of the loading.
    """  # fmt: skip
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def wrap(model: Any, tokenizer: Any, *, name: str, dtype_reason: str = "as given") -> LoadedModel:
    """A LoadedModel of a transformers model that is already in memory. Changes the model:
    eval mode, frozen parameters, kvtune's attention.
    """  # fmt: skip
    seam.register()
    model.eval().requires_grad_(False)
    geometry = read_geometry(model)
    require_same(model, geometry, seam.NAME, _through_the_seam(model, geometry))
    set_attention(model, seam.NAME)
    return LoadedModel(
        model=model,
        tokenizer=tokenizer,
        name=name,
        fingerprint=fingerprint(model, geometry),
        geometry=geometry,
        device=str(model.device),
        dtype=str(model.dtype).removeprefix("torch."),
        dtype_reason=dtype_reason,
    )


def _through_the_seam(model: Any, geometry: Geometry) -> Ask:
    """How the self-check asks a model that answers through the seam, without a cache."""
    answered: list[int] = []

    def handler(
        layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None
    ) -> Tensor:
        check_shapes(geometry, layer, q, k, v, scale, window)
        answered.append(layer)
        return seam.causal_attention(q, k, v, scale, window)

    def ask(ids: Tensor, _: Part) -> Tensor:
        with seam.attending(handler):
            logits: Tensor = model(input_ids=ids, use_cache=False).logits
        if answered != list(range(geometry.layers)):
            raise KvtuneError(
                f"{type(model).__name__} lets others answer its attention in the layers "
                f"{answered}, not once in each of its {geometry.layers}",
                hint="models with plain softmax attention work: Llama, Qwen, Mistral, Gemma-3.",
            )
        return logits

    return ask


def choose_dtype(device: str, asked: str | None = None) -> tuple[str, str]:
    """A dtype for the device, and one sentence that says why."""
    import torch

    if asked is not None:
        if asked not in DTYPES:
            raise KvtuneError(f"{asked!r} is no dtype", hint=nearest(asked, DTYPES))
        return asked, f"{asked} because it was asked for."
    if device == "cpu":
        return "float32", "float32: on a CPU half precision is slow, or hides what plans lose."
    if torch.cuda.get_device_capability(device) >= (8, 0):
        return "bfloat16", "bfloat16: the GPU computes it natively and it cannot overflow."
    return "float16", "float16: this GPU (before Ampere) has no native bfloat16."


def fingerprint(model: Any, geometry: Geometry) -> str:
    """sha256 over geometry and evenly spaced values of every weight.

    Values are read as bfloat16, those below fp16's range as zero, so that copies of the same
    weights in bf16, fp32 and (but for rare roundings) fp16, on any device, agree.
    """
    digest = hashlib.sha256(repr((type(model).__name__, asdict(geometry))).encode())
    for name, weight in sorted(model.state_dict().items()):
        digest.update(f"{name}{tuple(weight.shape)}".encode())
        digest.update(_sampled_bytes(weight))
    return digest.hexdigest()


def stored_fingerprint(name_or_path: str | Path) -> str:
    """The fingerprint of a model that is only read, on the CPU and in the dtype of its files.

    Raises:
        KvtuneError: unknown name or unreadable files.
    """
    seam.register()
    model, _ = _read(model_folder(str(name_or_path), Silent()), "auto", "cpu", False)
    return fingerprint(model, read_geometry(model))


def _sampled_bytes(weight: Tensor) -> bytes:
    import torch

    flat = weight.detach().reshape(-1)
    values = flat[:: max(1, flat.numel() // _FINGERPRINT_VALUES)].cpu()
    if values.is_floating_point():
        values = values.float()
        values = values.masked_fill(values.abs() < _SMALLEST_NORMAL_FP16, 0.0) + 0.0
        values = values.to(torch.bfloat16).contiguous().view(torch.int16)
    return values.contiguous().numpy().tobytes()


def best_device() -> str:
    """``cuda`` if there is one, else ``cpu``."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _device(device: str) -> str:
    import torch

    try:
        known = torch.device(device)
    except RuntimeError as error:
        raise KvtuneError(f"{device!r} is no device", hint="use cpu, cuda or cuda:0.") from error
    if known.type == "cpu":
        return "cpu"
    if known.type != "cuda":
        raise KvtuneError(f"{device!r} is not supported", hint="use cpu, cuda or cuda:0.")
    index = known.index or 0
    if not torch.cuda.is_available() or index >= torch.cuda.device_count():
        raise KvtuneError(f"this machine has no {device!r}", hint="use --device cpu.")
    return f"cuda:{index}"


def model_folder(name: str, progress: Progress, *, trust_remote_code: bool = False) -> str:
    """A folder that transformers can read; of the Hub with the model's code where it is trusted."""
    path = Path(name).expanduser()
    if name.lower() in KNOWN:
        stem, known = Path(store.GGUF).stem, store.GGUF_SHA256
        return _converted(stem, known, lambda: store.fetch_smollm2(progress), progress)
    if path.suffix.lower() == ".gguf":
        if not path.is_file():
            raise KvtuneError("no such GGUF file", where=name, hint="check the path.")
        return _converted(path.stem, sha256(path), lambda: path, progress)
    if path.is_dir():
        if not (path / "config.json").is_file():
            hint = "give a folder that a transformers model was saved in, or a .gguf file."
            raise KvtuneError("holds no config.json", where=name, hint=hint)
        return str(path)
    if name.count("/") == 1 and not name.startswith((".", "/", "~")):
        return hub_folder(name, progress, trust_remote_code=trust_remote_code)
    raise KvtuneError(
        f"no model called {name!r}",
        hint=nearest(name, KNOWN) + " Or give a folder, a .gguf file or a Hub id (owner/name).",
    )


def _converted(stem: str, digest: str, fetch: Callable[[], Path], progress: Progress) -> str:
    """The GGUF as a transformers folder in bf16: reading the GGUF itself takes 20 s or more.

    A tokenizer is read by the transformers release that saved it, so the release is in the key.
    """
    version = importlib.metadata.version("transformers")
    key = f"{stem}-{digest[:12]}-transformers-{version}-bfloat16"

    def build(folder: Path) -> None:
        gguf = fetch()
        progress.note(f"converting {gguf.name} once; later runs load the result")
        _convert(gguf, folder)

    return str(store.converted(key, build, progress))


def _convert(gguf: Path, folder: Path) -> None:
    import torch
    import transformers

    options = {"gguf_file": gguf.name, "dtype": torch.bfloat16, **unpacked_gguf()}
    try:
        with (
            _quiet(),
            contextlib.redirect_stderr(io.StringIO()),  # a bar that has no switch
            gguf_read_once(),
        ):
            tokenizer = transformers.AutoTokenizer.from_pretrained(
                str(gguf.parent), gguf_file=gguf.name
            )
            model = transformers.AutoModelForCausalLM.from_pretrained(str(gguf.parent), **options)
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        raise KvtuneError(
            f"this GGUF cannot be read: {_first_line(error)}",
            where=str(gguf),
            hint="transformers must know its architecture; a Hugging Face folder works too.",
        ) from error


def _read(folder: str, dtype: str, device: str, trust_remote_code: bool) -> tuple[Any, Any]:
    import transformers
    from safetensors import SafetensorError

    options = {"trust_remote_code": trust_remote_code}
    unreadable = (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError)
    try:
        with _quiet():
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **options)
            model = transformers.AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=dtype,
                attn_implementation=seam.NAME,
                use_safetensors=True,  # never a pickle
                **options,
            )
    except unreadable as error:
        raise KvtuneError(
            f"the model cannot be loaded: {_first_line(error)}",
            where=folder,
            hint="check the folder, or the Hub id and the network.",
        ) from error
    return model.to(device), tokenizer


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


class _quiet:  # noqa: N801 - used as a block, like contextlib's own
    """Silence transformers' own bars and advice for the block: kvtune reports progress itself."""

    def __enter__(self) -> None:
        from transformers.utils import logging

        self.level = logging.get_verbosity()
        self.bars = logging.is_progress_bar_enabled()
        logging.set_verbosity_error()
        logging.disable_progress_bar()

    def __exit__(self, *_: object) -> None:
        from transformers.utils import logging

        logging.set_verbosity(self.level)
        if self.bars:
            logging.enable_progress_bar()
