# make run: the main job (selftest) on whatever this machine has.  make test: all tests it can run.
PYTHON ?= python3
VENV := .venv

.PHONY: run test clean

run: $(VENV)/ready
	$(VENV)/bin/python -m allreduce_jit selftest

test: $(VENV)/ready
	$(VENV)/bin/python -m pytest

$(VENV)/ready: pyproject.toml setup.sh
	PYTHON="$(PYTHON)" ./setup.sh $(VENV)
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .hypothesis
