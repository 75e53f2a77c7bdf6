"""``kvtune import-policy``: what another tool found, as a policy file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvtune.cli import options
from kvtune.cli.output import speaking
from kvtune.common.errors import KvtuneError, nearest


def command(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The other tool's file.")],
    source: Annotated[
        str,
        typer.Option(
            "--from",
            metavar="TOOL",
            help="kvtuner (YAML of bits a layer), duo-attention (TSV of a number a head; RLKV's "
            "too) or budgets (.npy of shares or tokens a head).",
        ),
    ],
    model: options.Model,
    out: Annotated[
        Path, typer.Option("--out", metavar="FILE", help="The policy file to write.")
    ] = Path("policy.yaml"),
    as_json: options.Json = False,
) -> None:
    """Another tool's per-layer or per-head choice as a policy."""
    from kvtune.cli.inputs import check_writable
    from kvtune.common.files import write_text
    from kvtune.policies.export.importer import READERS, read_foreign
    from kvtune.policies.policy_file.document import PolicyDocument, write_policy
    from kvtune.simulator.model_facts import model_facts
    from kvtune.tuner.target import read_model

    if source not in READERS:
        raise KvtuneError(f"--from {source} is unknown", hint=nearest(source, READERS))
    check_writable(out.parent, "--out")
    facts = model_facts(read_model(model)[1])
    policy = read_foreign(file, source, facts.layers, facts.kv_heads)
    write_text(out, write_policy(PolicyDocument(policy, facts)))
    with speaking(as_json, quiet=as_json) as output:
        output.show(
            f"wrote {out}",
            f"next: kvtune validate {out} tells what it loses; kvtune simulate, what it takes",
        )
        output.finish("import-policy", {"policy": policy.name, "files": [out]})
