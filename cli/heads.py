"""``kvtune heads``: scores of a model's heads, detected, imported, exported, made into policies."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from kvtune.cli import options
from kvtune.cli.heads_detected import By, refuse_unread, scored
from kvtune.cli.heads_report import SCORES, as_plain, overlap_table, score_table
from kvtune.cli.output import speaking, table

if TYPE_CHECKING:
    from kvtune.policies.head_scores import HeadScores
    from kvtune.policies.policy import Policy

app = typer.Typer(help="Which heads retrieve, and policies that are made of them.")

Out = Annotated[Path, typer.Option("--out", "-o", metavar="FILE", help="Written.")]
From = Annotated[Path, typer.Argument(metavar="FILE", help="Head scores of kvtune heads.")]
Score = Annotated[
    str, typer.Option("--score", metavar="NAME", help="One of the file: retrieval, duo, ...")
]


@app.callback(invoke_without_command=True)
def listed(context: typer.Context, as_json: options.Json = False) -> None:
    """Which heads retrieve, and policies that are made of them."""
    if context.invoked_subcommand is not None:
        return
    with speaking(as_json, quiet=as_json) as output:
        output.show(table("Scores of heads", ("name", "is", "meaning"), SCORES, left=(0, 1, 2)), "")
        output.show("kvtune heads detect --out heads.safetensors measures a model's.")
        names = ("name", "is", "meaning")
        output.finish("heads", {"known": [dict(zip(names, row, strict=True)) for row in SCORES]})


@app.command()
def detect(
    context: typer.Context,
    out: Out,
    model: options.Model = "smollm2-135m",
    tokens: Annotated[
        int, typer.Option("--tokens", metavar="N", min=256, help="Of each needle sample.")
    ] = 1024,
    samples: Annotated[
        int, typer.Option("--samples", metavar="N", min=1, help="Needle samples.")
    ] = 6,
    block: Annotated[
        int, typer.Option("--block", metavar="N", min=2, help="Random tokens that repeat.")
    ] = 2500,
    by: Annotated[
        By,
        typer.Option(
            "--by",
            help="What attention looks at, or gates that are learned: so that states stay as they "
            "are (DuoAttention) or from generated answers (RLKV); minutes on a GPU.",
        ),
    ] = "attention",
    steps: Annotated[
        int | None,
        typer.Option(
            "--steps", metavar="N", min=1, help="Of learning; left out: 300 (duo), 60 (rlkv)."
        ),
    ] = None,
    seed: options.Seed = 0,
    device: options.Device = None,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Measure echo, induction, retrieval, semantic and sink heads; or learn gates of heads."""
    from kvtune.cli.inputs import check_writable
    from kvtune.tuner.target import read_weights

    refuse_unread(context, by)
    check_writable(out.absolute().parent, "--out")
    name = read_weights(model)[0]
    with speaking(as_json, quiet) as output:
        from kvtune.runtime.head_detectors import overlaps
        from kvtune.traces.models import best_device, load_model
        from kvtune.traces.workloads import Workload, build

        loaded = load_model(name, device=device or best_device(), progress=output.progress)
        plan = Workload(
            {"search": {"retrieval": samples}}, tokens=tokens, observed=min(128, tokens // 2)
        )
        asked = build(plan, loaded.tokenizer)
        found = scored(loaded, asked, by, block=block, steps=steps, seed=seed, output=output)
        found = _written(found, out)
        pairs = list(overlaps(found, loaded.geometry.kv_heads, 0.1))
        output.show(score_table(found), overlap_table(pairs), f"written to {out}")
        shared = [{"one": a, "other": b, "shared": share} for a, b, share in pairs]
        output.finish(
            "heads detect", {"out": out, **as_plain(found), "overlap_of_top_tenth": shared}
        )


@app.command(name="import")
def import_(
    source: Annotated[Path, typer.Argument(metavar="FILE", help="A published .tsv or .json.")],
    out: Out,
    score: Score,
    model: Annotated[str, typer.Option("--model", metavar="NAME", help="Whose heads they are.")],
    as_json: options.Json = False,
) -> None:
    """Read published gates (.tsv of DuoAttention, RLKV) or retrieval heads (.json)."""
    from kvtune.cli.inputs import check_writable
    from kvtune.common.errors import KvtuneError
    from kvtune.policies.head_scores import (
        About,
        HeadScores,
        read_gates,
        read_retrieval,
    )

    check_writable(out.absolute().parent, "--out")
    if source.suffix not in (".tsv", ".json"):
        raise KvtuneError(
            "is neither a .tsv of gates nor a .json of retrieval heads", where=str(source)
        )
    if source.suffix == ".tsv":
        found, about = read_gates(source), About("KV heads", "imported gates", source.name)
    else:
        found, about = read_retrieval(source), About("query heads", "imported", source.name)
    heads = _written(HeadScores(model, "", {score: found}, {score: about}), out)
    with speaking(as_json, quiet=as_json) as output:
        output.show(score_table(heads), f"written to {out}")
        output.finish("heads import", {"out": out, **as_plain(heads)})


@app.command()
def export(
    source: From,
    out: Out,
    score: Score,
    kv_heads: Annotated[
        int | None, typer.Option("--kv-heads", metavar="N", min=1, help="For gates, of a layer.")
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Write one score as .tsv (one column a KV head) or .json (query heads)."""
    from kvtune.cli.inputs import check_writable
    from kvtune.common.errors import KvtuneError
    from kvtune.policies.head_scores import read_heads, write_gates, write_retrieval

    check_writable(out.absolute().parent, "--out")
    heads = read_heads(source)
    table_, about = heads.score(score), heads.about.get(score)
    if out.suffix == ".tsv":
        write_gates(heads.of_kv_heads(score, kv_heads or table_.shape[1]), out)
    elif out.suffix != ".json":
        raise KvtuneError("name a .tsv or a .json file", where="--out")
    elif about is not None and about.heads == "KV heads":
        raise KvtuneError(
            f"the score {score!r} is of KV heads, the .json form of query heads",
            where="--out",
            hint="name a .tsv file.",
        )
    else:
        write_retrieval(table_, out)
    with speaking(as_json, quiet=as_json) as output:
        output.show(f"{score} written to {out}")
        output.finish("heads export", {"out": out, "score": score})


@app.command()
def policy(
    source: From,
    out: Out,
    system: Annotated[
        Literal["razor", "duo", "rlkv", "headkv"],
        typer.Option("--system", help="Whose rule: RazorAttention, DuoAttention, RLKV, HeadKV."),
    ],
    kv_heads: Annotated[
        int, typer.Option("--kv-heads", metavar="N", min=1, help="Of a layer of the model.")
    ],
    score: Annotated[
        str, typer.Option("--score", metavar="NAME", help="Left out: the system's own.")
    ] = "",
    context: Annotated[
        int, typer.Option("--context", metavar="N", min=1, help="Tokens of a prompt (razor).")
    ] = 8192,
    sparsity: Annotated[
        float,
        typer.Option("--sparsity", min=0, max=1, help="Share of streaming heads (duo, rlkv)."),
    ] = 0.5,
    budget: Annotated[
        int, typer.Option("--budget", metavar="N", min=1, help="Mean tokens of a head (headkv).")
    ] = 512,
    as_json: options.Json = False,
) -> None:
    """A policy file by a published rule, with this model's heads."""
    from kvtune.cli.inputs import check_writable
    from kvtune.common.files import write_text
    from kvtune.policies.head_scores import read_heads
    from kvtune.policies.policy_file.document import PolicyDocument, write_policy

    check_writable(out.absolute().parent, "--out")
    made = _made(read_heads(source), system, kv_heads, score, context, sparsity, budget)
    write_text(out, write_policy(PolicyDocument(made)))
    with speaking(as_json, quiet=as_json) as output:
        output.show(f"{made.name}, {made.layers} layers of {made.kv_heads} KV heads, in {out}")
        output.finish("heads policy", {"out": out, "system": system, "name": made.name})


def _made(
    heads: HeadScores,
    system: str,
    kv_heads: int,
    score: str,
    context: int,
    sparsity: float,
    budget: int,
) -> Policy:
    from kvtune.policies import head_plans

    def of(name: str) -> Any:
        return heads.of_kv_heads(score or name, kv_heads)

    if system == "razor":
        echo = heads.of_kv_heads("echo", kv_heads)
        return head_plans.razor_plan(of("induction"), echo, context)
    if system == "duo":
        return head_plans.gates_plan("DuoAttention", of("duo"), sparsity, head_plans.DUO, 256)
    if system == "rlkv":
        return head_plans.gates_plan("RLKV", of("rlkv"), sparsity, head_plans.RLKV, 64)
    return head_plans.headkv_plan(of("retrieval"), budget)


def _written(heads: HeadScores, out: Path) -> HeadScores:
    """Write them, beside what the file holds already."""
    from kvtune.policies.head_scores import read_heads, write_heads

    both = read_heads(out).joined(heads) if out.exists() else heads
    write_heads(both, out)
    return both
