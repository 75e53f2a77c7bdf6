# kvtune: what CI runs, in short words. Install first: pip install -e '.[dev]'
.PHONY: check lint types layers test format torture

check: lint types layers test

lint:
	ruff check .
	ruff format --check .

types:
	mypy

layers:
	lint-imports

test:
	pytest

format:
	ruff check --fix .
	ruff format .

# Damaged inputs, flipped bits, killed searches: SECONDS of them, an hour by hand, two minutes in CI.
SECONDS = 120
torture:
	python -m kvtune.benchmarks.torture --seconds $(SECONDS)
