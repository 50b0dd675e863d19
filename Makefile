# make run: the main job (selftest) on whatever this machine has.  make test: all tests it can run.
PYTHON ?= python3
VENV := .venv

.PHONY: run test clean

run: $(VENV)/ready
	$(VENV)/bin/python -m allreduce_jit selftest

# Two files at a time, but never two that share GPUs.
test: $(VENV)/ready
	@parallel=; if [ ! -e /dev/nvidia0 ] && $(VENV)/bin/python -c "import xdist" 2>/dev/null; then \
		parallel="-n 2 --dist loadfile"; fi; \
	$(VENV)/bin/python -m pytest $$parallel

$(VENV)/ready: pyproject.toml setup.sh
	PYTHON="$(PYTHON)" ./setup.sh $(VENV)
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .hypothesis
