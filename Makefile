# make run: the main job (selftest) on whatever this machine has.  make lint: ruff and pyright, as pyproject.toml configures them.
# make engines: the plug-ins inside the real vLLM and SGLang, on the CPU, each in an environment of its own (docs/engines.md).
# Tests in three tiers (docs/verification.md). make quick: plans, decisions and what users call.
# make docs: the pages, in build/site.  make pictures: their pictures, after a change of what they show.
# make dist: sdist and wheel into dist/, checked, and tried in an empty environment of each Python that is here.
# make mutants: small changes of the kernels' sources, and which of them no check notices; SAMPLE=N: so many, drawn at random; goes on where it was.
# make mutants-policy: the same of the policy, set-up and failures, whose tests are to notice; ONLY="policy/plan policy/host": of those modules.
# make test: all tests that this machine can run.  make proofs: in full what make test cuts short of the proofs about kernels.
PYTHON ?= python3
VENV := .venv

# Three files or tests at a time, for many wait for processes more than they compute; but never two that share GPUs.
pytest = parallel=; if [ ! -e /dev/nvidia0 ] && $(VENV)/bin/python -c "import xdist" 2>/dev/null; then \
		parallel="-n 3 --dist $(1)"; fi; \
	$(VENV)/bin/python -m pytest $$parallel

.PHONY: run quick test proofs mutants mutants-policy engines lint docs pictures dist clean

run: $(VENV)/ready
	$(VENV)/bin/python -m allreduce_jit selftest

quick: $(VENV)/ready
	@$(call pytest,loadfile) -m "not programs" tests/front tests/policy

# PROOFS_FOLLOW=1, as in CI, leaves away what make proofs does in full (tests/conftest.py).
test: $(VENV)/ready
	@$(call pytest,loadfile)

proofs: $(VENV)/ready
	@export LONG=1 TWIN_COLLECTIVES=10000; $(call pytest,worksteal) -m long tests/proofs

mutants: $(VENV)/ready
	$(VENV)/bin/python tests/proofs/mutation.py $(if $(SAMPLE),--sample $(SAMPLE)) $(if $(MINUTES),--minutes $(MINUTES)) $(if $(KNOWN),--known --fresh)

mutants-policy: $(VENV)/ready
	@$(VENV)/bin/python -c "import mutmut.models" 2>/dev/null || $(VENV)/bin/python -m pip install -q -e ".[mutation]"
	$(VENV)/bin/python tools/policy_mutants.py $(if $(ONLY),--only $(ONLY)) $(if $(WIDE),--wide)

engines: $(VENV)/ready
	PYTHON=$(VENV)/bin/python tools/engines.sh $(VENV)/engines

lint: $(VENV)/ready
	$(VENV)/bin/python -m ruff check .
	$(VENV)/bin/python -m ruff format --check .
	@if $(VENV)/bin/python -c "import pyright" 2>/dev/null; then \
		$(VENV)/bin/python -m pyright --pythonpath $(VENV)/bin/python; \
	else echo "lint: no pyright in $(VENV): types are not checked"; fi

docs: $(VENV)/ready
	@$(VENV)/bin/python -c "import material, mkdocstrings_handlers.python" 2>/dev/null || $(VENV)/bin/python -m pip install -q -e ".[docs]"
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/python -m mkdocs build --strict

pictures: $(VENV)/ready
	$(VENV)/bin/python tools/draw.py

dist: $(VENV)/ready
	$(VENV)/bin/python tools/distribution.py dist

$(VENV)/ready: pyproject.toml setup.cfg setup.sh
	PYTHON="$(PYTHON)" ./setup.sh $(VENV)
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .hypothesis
