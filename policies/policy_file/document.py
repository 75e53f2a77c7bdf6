"""The policy file: what ``search`` writes, ``simulate``, ``validate`` and ``export`` read.

Strict, versioned, and made to be edited by hand; ``write_policy`` explains it in its header.
"""

from __future__ import annotations

from kvtune.policies.policy_file.checker import PolicyFileError, Problem
from kvtune.policies.policy_file.parts import (
    VERSION,
    ModelFacts,
    Pattern,
    PolicyDocument,
    Provenance,
    Quality,
    Serving,
)
from kvtune.policies.policy_file.reader import read_policy
from kvtune.policies.policy_file.writer import as_plain, write_policy

__all__ = [
    "VERSION",
    "ModelFacts",
    "Pattern",
    "PolicyDocument",
    "PolicyFileError",
    "Problem",
    "Provenance",
    "Quality",
    "Serving",
    "as_plain",
    "read_policy",
    "write_policy",
]
