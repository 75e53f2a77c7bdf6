"""Prompt caches used again: edited, encoded in parallel, and blended from chunks."""
