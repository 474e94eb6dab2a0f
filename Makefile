# make demo | test | lint | fuzz | sanitize | bench
#
# The first target run makes .venv and installs requirements-dev.lock and .txt into it. `make test PY=/path/to/python` uses an
# interpreter of your own instead. ARGS goes to the command: make test ARGS="-k dialects".
# COMFYUI_PATH=<checkout> adds the tests that boot a real ComfyUI, with COMFYUI_PYTHON or the checkout's own venv.
# The whole suite runs in JOBS processes, each with one thread for torch; what ARGS chooses runs in one, where -s and --pdb work.

PYTHON ?= python3
ARGS ?=
JOBS ?= 2

ifdef PY
setup :=
else
PY := .venv/bin/python
setup := .venv/.installed
endif

.PHONY: demo test lint fuzz sanitize bench

demo: $(setup)
	$(PY) . demo $(ARGS)

test: $(setup)
	$(if $(ARGS),,OMP_NUM_THREADS=1) $(PY) -m pytest -q -rs $(if $(ARGS),$(ARGS),-n $(JOBS) --dist loadfile --no-loadscope-reorder)

lint: $(setup)
	$(PY) -m ruff check . $(ARGS)

fuzz: $(setup)
	$(PY) . fuzz $(ARGS)

# The one test left out only times torch's attention kernels, among them cuDNN's, which racecheck does not get through.
sanitize: $(setup)
	for tool in memcheck racecheck; do compute-sanitizer --tool $$tool --error-exitcode 9 $(PY) -m pytest -q -m cuda \
		$(if $(ARGS),$(ARGS),tests/kernels tests/host/compute tests/host/decode) --deselect tests/host/compute/test_attention.py || exit; done

bench: $(setup)
	$(PY) benchmarks/dequant.py $(ARGS)
	$(PY) benchmarks/linear.py $(ARGS)
	$(PY) benchmarks/step.py $(ARGS)

.venv/.installed: requirements-dev.txt requirements-dev.lock
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --disable-pip-version-check --require-hashes --no-deps -r requirements-dev.lock
	.venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@
