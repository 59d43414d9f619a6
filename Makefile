# Every target makes or refreshes its own virtual environment and touches nothing outside it.
#   make demo       train a small model from nothing and write a report: runs/demo/report.html
#   make test       all tests that need neither PyTorch, nor device compilers, nor several processes
#   make test-faults  processes that train together, are killed, stopped, cut off and left without disk: 10 minutes
#   make test-full  the rest: parity with PyTorch, compiles for devices, Slurm, Chromium, lm-evaluation-harness
#   make test-sky   SkyPilot itself reads what is rendered for it
#   make test-llamacpp  exported GGUF files in llama.cpp: perplexity, continuations, tokens; two minutes
#   make test-aot   of these the compiles for devices alone, without PyTorch
#   make proof-hf-memory  import and export of 1.1B parameters stay below twice their size: 14 GB of disk, 5 minutes
#   make proof-preflight  the 1.1B step compiled for six machines that are not here: 15 minutes
#   make proof-data  a million generated documents, killed ten times on the way: the same store byte for byte; 20 GB
#   make proof-loader  the loader over 10^8 and 10^9 tokens: speed, start, seek, memory: 3 minutes
#   make proof-kills  two and four processes, one at a time killed 20 times: no step lost, none twice; 20 minutes
#   make proof-fits  fits of made and published points: exact, and as sure as they say: a minute
#   make proof-lab  210 runs planned and 200 reported while a person waits: half a minute
#   make proof-startup  imports, helps and plans are quick and need no jax: three minutes
#   make proof-versus  the training step beside PyTorch's on this CPU, the same numbers first: ten minutes
#   make proof-soak  an hour of runs that are killed, stopped, damaged and short of disk: as if nothing had happened
#   make proof-llamacpp  what llama.cpp computes from exported files of every kind, beside ours: five minutes
#   make lint | bench | clean

VENV ?= .venv
# test processes; each simulates eight devices
WORKERS ?= 2
# a test that hangs is ended by its timeout, together with its process; another process would run it again
# and what took longest is said, for the whole must stay within what a person waits for
SPREAD := -q --durations 30 --durations-min 8 -n $(WORKERS) --dist loadfile --no-loadscope-reorder --max-worker-restart 0
RUN := $(VENV)/bin/python
FULL := $(VENV)/full/bin/python
AOT := $(VENV)/aot/bin/python
PIP := -m pip install -qq --disable-pip-version-check
comma := ,
PACKAGES := 'import sysconfig; print(sysconfig.get_path("purelib"))'

# The first of these that is Python 3.11 or newer; `make PYTHON=/path/to/python3` chooses another.
PYTHON ?= python3 python3.13 python3.12 python3.11
FIND_PYTHON = for p in $(PYTHON); do \
	"$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo "$$p"; break; }; done

.DEFAULT_GOAL := help
.PHONY: help demo test test-faults test-sky test-full test-llamacpp test-aot lint bench proof-hf-memory proof-preflight proof-data proof-loader proof-kills proof-fits proof-lab proof-startup proof-versus proof-soak proof-llamacpp clean always
.DELETE_ON_ERROR:

help:
	@sed -n 's/^#   //p' Makefile

# Made again when it is not there, half made, or its Python has gone.
ifneq ($(shell $(RUN) -c 'print(1)' 2>/dev/null),1)
$(VENV)/.made: always
endif
$(VENV)/.made:
	@python=$$($(FIND_PYTHON)); \
	if [ -z "$$python" ]; then echo "make: needs Python 3.11 or newer; none of '$(PYTHON)' is (make PYTHON=/path/to/python3)" >&2; exit 1; fi; \
	echo "making $(VENV) with $$("$$python" --version)" >&2; \
	"$$python" -m venv --clear $(VENV)
	@touch $@

$(VENV)/.run: requirements.txt pyproject.toml $(VENV)/.made
	@echo "installing requirements.txt into $(VENV)" >&2
	@$(RUN) $(PIP) -r requirements.txt
	@$(RUN) $(PIP) --no-deps -e .
	@touch $@

$(VENV)/.dev: requirements-dev.txt $(VENV)/.run
	@echo "installing requirements-dev.txt into $(VENV)" >&2
	@$(RUN) $(PIP) -r requirements-dev.txt
	@touch $@

# On top of the first and apart from it: a JAX program that finds the device compilers looks for the devices too, and
# complains when there are none.
define on_top
@echo "installing the extras $(2) into $(VENV)/$(1)" >&2
@$(RUN) -m venv --clear --without-pip $(VENV)/$(1)
@$(RUN) -c $(PACKAGES) >"$$($(VENV)/$(1)/bin/python -c $(PACKAGES))/base.pth"
@$(VENV)/$(1)/bin/python $(PIP) -e '.[$(2)]'
@touch $@
endef

$(VENV)/.full: $(VENV)/.dev
	$(call on_top,full,parity$(comma)preflight$(comma)eval)

$(VENV)/.aot: $(VENV)/.dev
	$(call on_top,aot,preflight)

$(VENV)/.sky: $(VENV)/.dev
	$(call on_top,sky,sky)

$(VENV)/.llamacpp: $(VENV)/.dev
	$(call on_top,llamacpp,llamacpp)

demo: $(VENV)/.run
	@$(RUN) -m tinyllama_jax demo --workdir runs/demo

test: $(VENV)/.dev
	@$(RUN) -m pytest $(SPREAD) --timeout 300 $(TESTS)

test-faults: $(VENV)/.dev
	@$(RUN) -m pytest $(SPREAD) -m faults --timeout 900 $(TESTS)

test-full: $(VENV)/.full
	@$(FULL) -m pytest $(SPREAD) -m "parity or aot or slurm or browser or harness" --timeout 900 $(TESTS)

test-sky: $(VENV)/.sky
	@$(VENV)/sky/bin/python -c 'import sky' # the tests skip what is not there
	@$(VENV)/sky/bin/python -m pytest -q -k skypilot tests/test_launch.py

test-llamacpp: $(VENV)/.llamacpp
	@$(VENV)/llamacpp/bin/python -m pytest -q -m llamacpp --timeout 900 $(TESTS)

test-aot: $(VENV)/.aot
	@$(AOT) -m pytest $(SPREAD) -m aot --timeout 900 $(TESTS)

lint: $(VENV)/.dev
	@$(RUN) -m ruff check .
	@$(RUN) -m ruff format --check .

bench: $(VENV)/.run
	@$(RUN) benchmarks/train_step.py

proof-hf-memory: $(VENV)/.run
	@$(RUN) benchmarks/proof_hf_memory.py

proof-preflight: $(VENV)/.aot
	@$(AOT) benchmarks/proof_preflight.py

proof-data: $(VENV)/.run
	@$(RUN) benchmarks/proof_data.py --documents 1000000

proof-loader: $(VENV)/.run
	@$(RUN) benchmarks/proof_loader.py

proof-kills: $(VENV)/.run
	@$(RUN) benchmarks/proof_kills.py

proof-fits: $(VENV)/.run
	@$(RUN) benchmarks/proof_fits.py

proof-lab: $(VENV)/.run
	@$(RUN) benchmarks/proof_lab.py

proof-startup: $(VENV)/.run
	@$(RUN) benchmarks/startup.py --out benchmarks/results/startup.jsonl

proof-versus: $(VENV)/.full
	@$(FULL) benchmarks/versus_torch.py --experiment experiments.speed:cpu_best --rounds 3 --steps 10 --minimum 0.75 \
		--out benchmarks/results/versus_torch_cpu.jsonl

proof-llamacpp: $(VENV)/.llamacpp
	@$(VENV)/llamacpp/bin/python benchmarks/proof_llamacpp.py

proof-soak: $(VENV)/.run
	@$(RUN) tests/soak.py --minutes 60 --out benchmarks/results/proof_soak.json

clean:
	@rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
