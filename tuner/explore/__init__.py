"""A study as frozen snapshots, for whoever looks at it: no screen, no torch, no Optuna."""

from __future__ import annotations

PLANS_FILE = "plans.jsonl"
"""In a run directory: what all plans share, then one line a plan."""

COLUMNS_FILE = "plans.safetensors"
"""Beside it once a search has ended: the same plans in columns."""
