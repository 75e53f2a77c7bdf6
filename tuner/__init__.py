"""Which budgets to choose: allocation, baselines, the study and validation."""
