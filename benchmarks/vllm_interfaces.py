"""Whether a release of vLLM still has what the plugin's adapters use; its source is only parsed.

    pip download --no-deps vllm==0.33.0 && unzip -q vllm-0.33.0*.whl 'vllm/*' -d FOLDER
    python benchmarks/vllm_interfaces.py FOLDER/vllm vllm_0_32

For every name that the adapter's modules import from vLLM: that it is there. For every method that
they override: that it takes the arguments that vLLM's own has, by their names and in their order.
For fields that are read: that the class names them. Ends with 1 where something is missing.
"""

from __future__ import annotations

import argparse
import ast
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

SERVING = Path(__file__).parents[1] / "runtime" / "serving"
SHARED = ("vllm_attention", "vllm_planning")
OVERRIDDEN = {
    "PlanBackend": ("v1/attention/backend.py", "AttentionBackend"),
    "Backend": ("v1/attention/backend.py", "AttentionBackend"),
    "Builder": ("v1/attention/backend.py", "AttentionMetadataBuilder"),
    "Impl": ("v1/attention/backend.py", "AttentionImpl"),
    "PlanSpec": ("v1/kv_cache_interface.py", "KVCacheSpec"),
    "LayerSpec": ("v1/kv_cache_interface.py", "KVCacheSpec"),
    "WholeSpec": ("v1/kv_cache_interface.py", "KVCacheSpec"),
    "PlanManager": (
        "v1/core/single_type_kv_cache_manager.py", "SingleTypeKVCacheManager",
    ),
    "Worker": ("v1/worker/gpu_worker.py", "Worker"),
}  # fmt: skip
READ = {
    ("v1/attention/backend.py", "CommonAttentionMetadata"): (
        "num_reqs", "block_table_tensor", "query_start_loc_cpu", "seq_lens",
        "seq_lens_cpu_upper_bound", "max_query_len",
    ),
    ("v1/attention/backend.py", "AttentionCGSupport"): ("UNIFORM_SINGLE_TOKEN_DECODE",),
    ("v1/attention/backends/registry.py", "AttentionBackendEnum"): ("CUSTOM", "CPU_ATTN"),
    ("v1/core/single_type_kv_cache_manager.py", "SingleTypeKVCacheManager"): (
        "req_to_blocks", "block_pool",
    ),
    ("v1/kv_cache_interface.py", "FullAttentionSpec"): ("sliding_window", "non_causal"),
    ("v1/kv_cache_interface.py", "AttentionSpec"): ("num_kv_heads", "head_size"),
    ("v1/kv_cache_spec_registry.py", "KVCacheSpecRegistry"): ("register",),
}  # fmt: skip
READ_BY = {
    "vllm_0_26": {
        ("v1/worker/gpu_model_runner.py", "GPUModelRunner"): (
            "shared_kv_cache_layers", "attn_groups", "input_batch",
        ),
        ("v1/worker/block_table.py", "BlockTable"): ("get_numpy_array",),
        ("config/parallel.py", "ParallelConfig"): ("worker_cls",),
    },
    "vllm_0_32": {
        ("v1/attention/backend.py", "AttentionBackend"): ("customize_spec",),
        ("v1/kv_cache_interface.py", "KVCacheSpec"): (
            "has_layer_views", "uses_slot_mapping", "prefix_cacheable",
        ),
    },
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path, help="the folder of the package vllm")
    parser.add_argument("adapter", choices=sorted(READ_BY))
    arguments = parser.parse_args()
    modules = [*SHARED, *(path.stem for path in sorted(SERVING.glob(f"{arguments.adapter}*.py")))]
    checks = [
        *imports(arguments.source, modules),
        *overrides(arguments.source, modules),
        *fields(arguments.source, READ | READ_BY[arguments.adapter]),
    ]
    for what, missing in checks:
        if missing:
            print(f"{what}: {missing}")
    faults = sum(bool(missing) for _, missing in checks)
    print(f"{len(checks)} interfaces of {arguments.source}, {faults} missing or changed")
    sys.exit(faults > 0)


@cache
def parsed(path: Path) -> ast.Module | None:
    """A file's syntax tree; a package's is in its ``__init__``."""
    for each in (path, path.with_suffix("") / "__init__.py"):
        if each.exists():
            return ast.parse(each.read_text("utf-8"))
    return None


def imports(source: Path, modules: list[str]) -> Iterator[tuple[str, str]]:
    """Names imported from vLLM; what a package hands on lazily is looked for as text."""
    for module in modules:
        for node in ast.walk(parsed(SERVING / f"{module}.py")):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("vllm"):
                path = source.joinpath(*node.module.split(".")[1:]).with_suffix(".py")
                tree = parsed(path)
                for name in node.names:
                    known = tree is not None and f"'{name.name}'" in ast.dump(tree)
                    yield f"{node.module}.{name.name}", "" if known else "is not there"


def overrides(source: Path, modules: list[str]) -> Iterator[tuple[str, str]]:
    """Methods of our classes beside those that they take the place of."""
    for module in modules:
        for name, body in classes(parsed(SERVING / f"{module}.py")):
            if name not in OVERRIDDEN:
                continue
            path, base = OVERRIDDEN[name]
            theirs = methods(source / path, base)
            for mine in (node for node in body if isinstance(node, ast.FunctionDef)):
                if mine.name in theirs:
                    yield f"{base}.{mine.name}", refused(mine, theirs[mine.name])


def refused(mine: ast.FunctionDef, theirs: ast.FunctionDef) -> str:
    """Arguments of theirs that ours does not take, or takes elsewhere."""
    own = [each.arg for each in mine.args.args]
    for at, name in enumerate(each.arg for each in theirs.args.args):
        if at < len(own) and own[at] != name and not mine.args.vararg:
            return f"argument {at} is {name}, ours {own[at]}"
        if at >= len(own) and not mine.args.vararg:
            return f"gives {name} too"
    return ""


def fields(
    source: Path, wanted: dict[tuple[str, str], tuple[str, ...]]
) -> Iterator[tuple[str, str]]:
    """Attributes that are read, and switches that are set: named in the class at all."""
    for (path, name), known in wanted.items():
        body = dict(classes(parsed(source / path))).get(name)
        text = "" if body is None else "".join(ast.dump(node) for node in body)
        for each in known:
            yield f"{name}.{each}", "" if f"'{each}'" in text else "is not there"


def classes(tree: ast.Module | None) -> Iterator[tuple[str, list[ast.stmt]]]:
    for node in ast.walk(tree) if tree else ():
        if isinstance(node, ast.ClassDef):
            yield node.name, node.body


def methods(path: Path, name: str) -> dict[str, ast.FunctionDef]:
    body = dict(classes(parsed(path))).get(name, [])
    return {node.name: node for node in body if isinstance(node, ast.FunctionDef)}


if __name__ == "__main__":
    main()
