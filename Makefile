# kvtune: what CI runs, in short words. Install first: pip install -e '.[dev]'
.PHONY: check lint types layers test format

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
