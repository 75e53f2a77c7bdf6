# kvtune: what CI runs, in short words. Install first: pip install -e '.[dev]'
.PHONY: check lint types layers test docs package format torture

check: lint types layers test

lint:
	ruff check .
	ruff format --check .

types:
	mypy
	mypy --config-file .ci/mypy-benchmarks.ini benchmarks/*.py

layers:
	lint-imports

test:
	pytest

# Needs the extra "docs": pip install -c constraints/lock.txt -e '.[docs]'
docs:
	python docs/reference.py
	mkdocs build --strict

# Wheel and sdist, tried on every Python that is named: make package PYTHONS="python3.10 python3.13"
PYTHONS = python3
package:
	.ci/package $(PYTHONS)

format:
	ruff check --fix .
	ruff format .

# Damaged inputs, flipped bits, killed searches: SECONDS of them, an hour by hand, two minutes in CI.
SECONDS = 120
torture:
	python -m kvtune.benchmarks.torture --seconds $(SECONDS)
