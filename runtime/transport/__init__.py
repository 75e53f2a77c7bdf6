"""Prompt caches as they travel: encoded for a network or a disk, and read back."""
