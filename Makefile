PYTHON ?= python
TESTS ?=  # arguments of pytest, as in `make check TESTS="-m slow"`

.PHONY: check format test slow claims docs

check:  ## style, import layers, fast tests
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m pytest tests/test_layers.py
	$(PYTHON) -m pytest $(TESTS)

format:  ## mend what ruff can mend
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .

test:  ## fast tests
	$(PYTHON) -m pytest

slow:  ## the tests that plain pytest leaves out
	$(PYTHON) -m pytest -m slow

claims:  ## what learns takes minutes and several seeds: writes docs/claims
	$(PYTHON) -m tests.claims

docs:  ## docs/keys.md and docs/api.md from the sources; notebooks without what running them left
	$(PYTHON) docs/build.py
