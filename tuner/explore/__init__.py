"""A study as frozen snapshots, for whoever looks at it: no screen, no torch, no Optuna."""
