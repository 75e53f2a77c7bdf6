"""Capturing a trace: what every head attends to, and how much the model's output would mind.

For each sample the prompt is run without gradients and its q, k, v are kept; the observed tokens
are then run on it with a graph through them alone. Probes are
gradients of random directions of the logits with respect to each layer's attention output before
the output projection; S of them tell what a change of that output costs in KL divergence.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from kvtune.common.lock import locked
from kvtune.common.progress import Progress, Silent
from kvtune.common.rotary import later_queries, query_moments
from kvtune.traces.asking import ASKED, asked_again
from kvtune.traces.calibration import require_calibration
from kvtune.traces.output_head import OutputHead, Slopes
from kvtune.traces.parts import remove_parts
from kvtune.traces.passes import run_observed, run_prompt
from kvtune.traces.probes import Probes
from kvtune.traces.samples import Sample
from kvtune.traces.sentences import sentence_ends
from kvtune.traces.signals import column_sums
from kvtune.traces.trace import Trace, open_trace
from kvtune.traces.writer import CaptureSettings, TraceWriter

if TYPE_CHECKING:
    from torch import Tensor

    from kvtune.traces.models import LoadedModel

_PROBE_BYTES = 2**30
_WRITERS = 8
_STAYING_QUERIES = 1024
"""Prompt queries that stay on the device until a sample is written: fetching those of each layer as
it runs would wait for it."""


@dataclass(frozen=True)
class _Prompt:
    """What the prompt pass leaves, per layer."""

    cache: list[tuple[Tensor, Tensor]]  # k, v [1, H, P, D] on the model's device
    queries: list[Tensor]  # [Hq, P or fewer, D]; many are on the CPU
    signals: list[dict[str, Tensor]]  # by name, as asked for


@dataclass(frozen=True)
class Observed:
    """What the observed pass leaves, per layer and for the model's output.

    Args:
        rows: q, k, v and output of each layer's observed tokens, [., C, D].
        probes: of each layer [S, C, Hq, D].
        target_logprob: log-probability of every row's target, in nats [C].
        predicted: the most probable token of every row [C].
    """

    rows: list[tuple[Tensor, Tensor, Tensor, Tensor]]
    probes: list[Tensor]
    target_logprob: list[float]
    predicted: list[int]


def capture(
    loaded: LoadedModel,
    samples: Sequence[Sample],
    out_dir: Path,
    *,
    probes: int,
    seed: int = 0,
    workload_description: str = "",
    progress: Progress | None = None,
    queries: Literal["all", "observed"] | int = "all",
    signals: Iterable[str] = (),
) -> Trace:
    """Capture samples into ``out_dir``, continuing what an interrupted call began there.

    Args:
        loaded: the model.
        samples: what to run; ids must differ.
        out_dir: folder of the trace; samples finished there are not run again.
        probes: S of each sample.
        seed: draws the probes, each sample from its own stream.
        workload_description: goes into the manifest.
        progress: a bar over the samples.
        queries: which queries to store: all N, the C observed, or the last so many.
        signals: names from ``signals.SIGNALS``: ``column_sums`` asks for the prompt's attention
            mass a key, ``query_moments`` for statistics of its queries, ``later_queries`` for a
            sample of them, ``reconstruction``, ``repeat_queries`` and ``study_queries`` for passes
            behind the prompt, ``calibration`` for what was measured on the model before.

    Raises:
        KvtuneError: the folder holds another trace or cannot be written; unknown signal.
    """
    progress = progress or Silent()
    settings = CaptureSettings.of(
        loaded, samples, probes, seed, workload_description, queries, tuple(signals)
    )
    with locked(Path(out_dir), wait=True, progress=progress):
        writer = TraceWriter(Path(out_dir), settings)
        waiting = [(i, s) for i, s in enumerate(samples) if not writer.finished(s)]
        if waiting and len(waiting) < len(samples):
            progress.note(f"{len(samples) - len(waiting)} samples are already captured")
        with ThreadPoolExecutor(1) as background:  # a sample is written while the next one runs
            written: Future[None] | None = None
            for index, sample in progress.track(waiting, "capturing attention", len(waiting)):
                ran = _run(loaded, sample, settings)
                if written is not None:
                    written.result()
                written = background.submit(_write, writer, index, sample, *ran)
            if written is not None:
                written.result()
        writer.close()
        remove_parts(Path(out_dir))  # of helpers that ended before all samples were there
        return open_trace(Path(out_dir), writer.hashed)


def capture_sample(
    loaded: LoadedModel, sample: Sample, index: int, settings: CaptureSettings, writer: TraceWriter
) -> None:
    """Run one sample and write it; ``index`` is its place among the trace's samples."""
    _write(writer, index, sample, *_run(loaded, sample, settings))


def _run(
    loaded: LoadedModel, sample: Sample, settings: CaptureSettings
) -> tuple[_Prompt, Observed]:
    prompt = _run_prompt(loaded, sample, settings)
    probes = Probes(settings.probes, settings.seed)
    return prompt, observe(loaded, sample, prompt.cache, probes)


def _write(
    writer: TraceWriter, index: int, sample: Sample, prompt: _Prompt, observed: Observed
) -> None:
    with writer.sample(index, sample) as folder:

        def write(layer: int) -> None:
            folder.write_layer(layer, _tensors(prompt, observed, layer))

        with ThreadPoolExecutor(_WRITERS) as pool:  # hashing takes longer than the model's passes
            list(pool.map(write, range(len(observed.rows))))
        folder.finish(observed.target_logprob, observed.predicted)


def _run_prompt(loaded: LoadedModel, sample: Sample, settings: CaptureSettings) -> _Prompt:
    result = _Prompt([], [], [])
    tail = settings.stored_queries(sample) - sample.observed  # prompt queries to keep
    geometry = loaded.geometry

    def keep(layer: int, q: Tensor, k: Tensor, v: Tensor) -> None:
        result.cache.append((k, v))
        kept = q[0, :, q.shape[2] - tail :].clone()  # a view would keep all queries alive
        result.queries.append(kept if tail <= _STAYING_QUERIES else kept.cpu())
        found: dict[str, Tensor] = {}
        if "column_sums" in settings.signals:
            window = geometry.windows[layer]
            found["column_sums"] = column_sums(q[0], k[0], geometry.scale, window)
        if "query_moments" in settings.signals:
            moments = query_moments(q[0], geometry.rope_at(layer))
            found["query_mean"], found["query_covariance"] = moments
        if "later_queries" in settings.signals:
            found["later_queries"] = later_queries(q[0], geometry.rope_at(layer))
        result.signals.append(found)

    token_ids = sample.token_ids[: sample.prompt]
    run_prompt(loaded, token_ids, keep)
    if more := [name for name in ASKED if name in settings.signals]:
        answers = asked_again(loaded, token_ids, result.cache, more)
        for found, answer in zip(result.signals, answers, strict=True):
            found.update(answer)
    if "sentences" in settings.signals:
        ends = sentence_ends(loaded, sample.token_ids)
        for found in result.signals:
            found["sentence_ends"] = ends
    if "calibration" in settings.signals:
        calibration = require_calibration(loaded.fingerprint)
        for layer, found in enumerate(result.signals):
            found.update(calibration.tensors(layer))
    return result


def observe(
    loaded: LoadedModel,
    sample: Sample,
    cache: Sequence[tuple[Tensor, Tensor]],
    probes: Probes,
) -> Observed:
    """One forward over the observed tokens, then the S probes through its graph.

    Args:
        loaded: the model.
        sample: whose observed tokens.
        cache: its prompt's keys and values, (k, v) a layer, each [1, H, P, D].
        probes: how they are drawn.
    """
    import torch

    from kvtune.traces.observed_attention import attended

    rows: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    outputs: list[Tensor] = []

    def handler(
        layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None
    ) -> Tensor:
        output = attended(q, k, v, cache[layer], scale, window)
        if not output.requires_grad:
            output.requires_grad_(True)  # the first layer: everything after hangs on it
        outputs.append(output)
        rows.append(tuple(x[0].detach() for x in (q, k, v, output)))  # type: ignore[arg-type]
        return output

    together = _together(loaded, sample, probes.count)
    observed_ids = sample.token_ids[sample.prompt :]
    with torch.inference_mode(False), torch.enable_grad():
        with OutputHead.of(loaded.model) as head:
            logits = run_observed(loaded, observed_ids, sample.prompt, handler)
        log_p = logits[0].detach().float().log_softmax(-1)  # [C, vocabulary]
        end, slopes = head.directions(logits, probes.draw(log_p, sample.id))
        gradients = _gradients(end, outputs, slopes, probes.count, together)
    targets = torch.tensor(sample.targets, device=log_p.device)[:, None]
    return Observed(
        rows, gradients, log_p.gather(1, targets)[:, 0].tolist(), log_p.argmax(-1).tolist()
    )


def _together(loaded: LoadedModel, sample: Sample, probes: int) -> int:
    """Probes that one backward pass yields together, as many as memory is meant for.

    A probe holds a direction of the logits, and one layer's attention in float32 at a time.
    """
    geometry = loaded.geometry
    attention = geometry.query_heads * len(sample.token_ids)
    a_probe = sample.observed * max(geometry.vocab_size, 2 * attention) * 4
    return max(1, min(probes, _PROBE_BYTES // a_probe))


def _gradients(
    end: Tensor, outputs: list[Tensor], slopes: Slopes, probes: int, together: int
) -> list[Tensor]:
    """Gradients of the probes' directions at every layer's attention output, [S, C, Hq, D] each."""
    import torch

    pieces: list[list[Tensor]] = [[] for _ in outputs]
    for first in range(0, probes, together):
        more = first + together < probes

        def back(slope: Tensor, more: bool = more) -> tuple[Tensor, ...]:
            return torch.autograd.grad(end, outputs, slope, retain_graph=more)

        # Not ``is_grads_batched``, whose older vmap takes many operations apart, probe by probe.
        grads = torch.func.vmap(back)(slopes(first, together)[:, None].to(end.dtype))
        for piece, grad in zip(pieces, grads, strict=True):
            piece.append(grad[:, 0].transpose(1, 2))  # [probes of this pass, C, Hq, D]
    return [torch.cat(piece) for piece in pieces]


def _tensors(prompt: _Prompt, observed: Observed, layer: int) -> dict[str, Tensor]:
    """One layer's shard: q, k, v over the sequence, output, probes and signals."""
    import torch

    q, k, v, output = observed.rows[layer]
    (keys, values), asked = prompt.cache[layer], prompt.queries[layer]
    tensors = {
        "q": torch.cat([asked, q.to(asked.device)], dim=1),  # [Hq, N or fewer, D]
        "k": torch.cat([keys[0], k], dim=1),  # [H, N, D]
        "v": torch.cat([values[0], v], dim=1),  # [H, N, D]
        "output": output,  # [Hq, C, D]
        "probes": observed.probes[layer],  # [S, C, Hq, D]
    }
    return tensors | prompt.signals[layer]
