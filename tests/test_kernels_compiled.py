"""Decode attention compiled for a GPU, without one: its loops copy pages in the background."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="Triton is not installed; there is nothing to compile")

COMPILE = """
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kvtune.policies.pages import PageLayout
from kvtune.runtime.kernels.decode import decode_attention as kernel

pairs = tuple(PageLayout(128, name, name).code for name in ("bf16", "int4"))
constants = {"D": 128, "G": 4, "M": 8, "PAIRS": pairs, "N_PAIRS": 2, "STAGES": 3, "NATIVE": True}
constants["EXPORT"] = 0
pools = {"pool_half": "*fp16", "pool_bf16": "*bf16", "pool_fp8": "*fp8e4nv"}
ints = dict.fromkeys(("tiles", "table", "lengths", "arrived"), "*i32")
others = {"q": "*bf16", "out": "*bf16", "softmax_scale": "fp32"}
known = dict.fromkeys(constants, "constexpr") | pools | ints | others
signature = {name: known.get(name, "*fp32") for name in kernel.arg_names}
aligned = {
    (n,): [["tt.divisibility", 16]]
    for n, type_ in enumerate(signature.values()) if type_.startswith("*")
}
source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
made = compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 1})
copied = made.asm["ttgir"].split("async_copy_global_to_local")[1:]
kinds = [text.split("->")[1].split(",")[0].strip() for text in copied]
print(sum("xbf16" in kind for kind in kinds), sum("xf16" in kind for kind in kinds))
"""


@pytest.mark.full
def test_pages_of_either_kind_are_copied_while_others_are_worked_on() -> None:
    """Triton gives the copies up where it does not see that addresses are aligned."""
    plain = {name: text for name, text in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(  # noqa: S603
        [sys.executable, "-W", "ignore", "-c", COMPILE],
        env=plain, capture_output=True, text=True, check=True,
    )  # fmt: skip
    in_bf16, coded = map(int, done.stdout.split())
    assert in_bf16 >= 6, "keys and values, three steps of them"
    assert coded >= 6, "codes and scales likewise"
