# `make serve` and `make test` do all the set-up that they need, once. `make help` lists the rest.

VENV ?= .venv
PYTHON ?= python3
HOST ?= 127.0.0.1
PORT ?= 30000
# Another model to serve than the demo model: make serve MODEL=/path/to/model
MODEL ?=
SERVE_ARGS ?=
DEMO_ARGS ?=
EXPLAIN_ARGS ?=
SOAK_ARGS ?=
BENCH_SAMPLES ?= 50
TESTS ?= tests
PYTEST_ARGS ?=

PY := $(VENV)/bin/python
# Compiling all of torch's and SGLang's modules to bytecode takes minutes; Python does it for those that are imported.
PIP_INSTALL = $(PY) -m pip install --quiet --upgrade pip && $(PY) -m pip install --no-compile
CACHE := $(or $(SGLANG_CLUSTERKV_CACHE),$(HOME)/.cache/sglang-clusterkv)
SERVED := $(or $(MODEL),$(CACHE)/SmolLM2-135M-Instruct)
# Before anything is installed for it; what is no path is a model's name on a hub.
$(if $(filter /% .%,$(MODEL)),$(if $(shell test -e '$(MODEL)' && echo there),,$(error there is no model at $(MODEL): pass the folder of one)))

# Without an accelerator the server needs to be told so, and would size its KV pool by the whole memory of the machine.
CPU_ARGS := --device cpu --max-total-tokens 65536
# Without AMX, decode steps in float32 are several times faster than in bf16: they run by our kernels.
CPU_ARGS += $(shell grep -qs amx_bf16 /proc/cpuinfo || echo --dtype float32)

# Where it is set, as in many images, each of a server's three processes compiles SGLang's sources anew: a minute, not 20 s.
export PYTHONDONTWRITEBYTECODE :=

.DEFAULT_GOAL := help
.PHONY: help env dev-env browser demo-model serve demo explain test selected warm test-all test-unit test-compiled test-servers test-long test-gpu gpu-kit sanitize bench bench-quick soak mutants check package lint style types clean

help:
	@echo "make serve   environment (once), demo model (once), then a server on $(HOST):$(PORT) with clusterkv"
	@echo "             MODEL=/path PORT=30001 SERVE_ARGS='--page-size 32'; options of the plugin by the environment:"
	@echo "             SGLANG_CLUSTERKV_CONFIG='{\"budget_tokens\": 256}' make serve"
	@echo "make test    environment with test tools (once), demo model (once), then all tests but the long ones:"
	@echo "             'make test-unit test-servers test-compiled', the first two as one queue: a process per core, servers first"
	@echo "             TESTS=tests/tools/test_cli.py PYTEST_ARGS='-k word'"
	@echo "make browser Debian's Chromium for the tests of pages, as root; without it they are skipped and say so"
	@echo "make test-unit     the tests that need no server, a process per core"
	@echo "make test-compiled  the Triton kernels as machine code, without a GPU: registers, spills, instructions"
	@echo "make test-servers  those against real servers, two at a time"
	@echo "make test-long  the tests that make test leaves out: churn, kill, tensor parallelism on servers; 8 minutes"
	@echo "make demo-model, make dev-env  the demo model alone; the environment with test tools alone"
	@echo "make demo    an agent over a long document, against a running 'make serve' (DEMO_ARGS=--small, or --tier)"
	@echo "make explain  a page that shows what an answer was read from, against a running 'make serve' (EXPLAIN_ARGS='--document FILE"
	@echo "             --question \"...\"'); make serve keeps traces unless it is given SERVE_ARGS or options"
	@echo "make bench-quick  KL against bytes read, each operation's time, servers under load: the essential tables, 10 minutes"
	@echo "make bench   the whole evaluation, quality and speed; alone on the machine, a night (BENCH_SAMPLES=10 shortens it)"
	@echo "make test-gpu  on a machine with a CUDA device, without network and pip, in 8 minutes at most: the kernels' tests there,"
	@echo "             graphs, each operation's time beside the prediction, servers, memcheck (GPU_ARGS='--parts tests graphs')"
	@echo "make gpu-kit what such a machine may lack, SGLang among it, as one archive (docs/gpu.md)"
	@echo "make sanitize  on such a machine: compute-sanitizer's memcheck and racecheck, as long as they take"
	@echo "make soak    30 minutes of mixed traffic: are memory and latency flat? (SOAK_ARGS='--minutes 5')"
	@echo "make mutants breaks the engine, one rule at a time: the state machine of the tests must notice each"
	@echo "make check   compares the installed SGLang with what this package relies on; SGLANG=0.5.22 another release, which it fetches"
	@echo "make package  sdist and wheel in dist/, and their tests: a server from the wheel in an environment of its own"
	@echo "make lint    ruff check, ruff format --check, import-linter (the floors), mypy"
	@echo "make clean   removes $(VENV) (if make made it) and caches; the demo model stays in $(CACHE)"

$(PY):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "$(PYTHON) is older than Python 3.11: pass another one, as in make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV) || { rm -f $@; exit 1; }
	@touch $(VENV)/.made-by-make

$(VENV)/.installed: pyproject.toml | $(PY)
	@echo "Installing SGLang and this package into $(VENV), once: about 3 minutes, 11 GB on disk."
	$(PIP_INSTALL) -e '.[demo]'
	@touch $@

$(VENV)/.installed-dev: pyproject.toml | $(PY)
	@echo "Installing SGLang, this package and its test tools into $(VENV), once: about 3 minutes, 11 GB on disk."
	$(PIP_INSTALL) -e '.[dev]'
	@touch $@ $(VENV)/.installed

env: $(VENV)/.installed

dev-env: $(VENV)/.installed-dev

browser:
	@command -v chromium >/dev/null || \
		{ apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends chromium >/dev/null; }

demo-model: env
	@$(PY) -m sglang_clusterkv.tools.cli demo-model

# Other arguments may not go with traces.
serve: export SGLANG_CLUSTERKV_CONFIG ?= $(if $(SERVE_ARGS),,{"trace": true})
serve: env $(if $(MODEL),,demo-model)
	@echo
	@echo "Serving $(SERVED) on http://$(HOST):$(PORT) with clusterkv; ready in about a minute. Ctrl-C ends it."
	@echo "Talk to it from another terminal, or run 'make demo' there:"
	@echo "  curl -s http://$(HOST):$(PORT)/v1/chat/completions -H 'Content-Type: application/json' \\"
	@echo "    -d '{\"model\": \"default\", \"messages\": [{\"role\": \"user\", \"content\": \"What is the capital of France?\"}]," \
		"\"temperature\": 0, \"max_tokens\": 64}'"
	@echo
	@if $(PY) -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then cpu_args=; else cpu_args='$(CPU_ARGS)'; fi; \
	exec $(PY) -m sglang.launch_server --model-path '$(SERVED)' --attention-backend clusterkv \
		--host $(HOST) --port $(PORT) --enable-cache-report $$cpu_args $(SERVE_ARGS)

demo: env
	$(PY) examples/agent.py --base-url http://$(HOST):$(PORT)/v1 $(DEMO_ARGS)

explain: env
	$(PY) -m sglang_clusterkv.tools.cli explain --base-url http://$(HOST):$(PORT) $(EXPLAIN_ARGS)

# A selection of tests selects no kernels.
test: $(if $(PYTEST_ARGS),selected) test-all $(if $(PYTEST_ARGS),,$(if $(filter tests,$(TESTS)),test-compiled))

# Each of the processes that run tests at once would compile the same kernels.
warm: dev-env
	@$(PY) -m tests.support.warm

# -W: else SWIG's warning at the interpreter's end comes after pytest's summary. 5: $(TESTS) has none of the kind.
PYTEST = code=0; $(PY) -W 'ignore:builtin type:DeprecationWarning' -m pytest $(TESTS) --durations=10
OR_NONE = || code=$$?; test $$code -eq 5 || exit $$code

selected: dev-env
	@$(PY) -m pytest $(TESTS) -m 'not long' $(PYTEST_ARGS) --collect-only -qq >/dev/null 2>&1; \
	test $$? -ne 5 || { echo "PYTEST_ARGS selects no test of $(TESTS)"; exit 1; }

# One thread each: busy processes of several threads hold each other up. The order is that of tests/conftest.py.
QUEUE = --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS) $(OR_NONE)

test-all: dev-env demo-model warm
	@export OMP_NUM_THREADS=1; $(PYTEST) -m 'not long' -n auto $(QUEUE)

test-unit: dev-env demo-model warm
	@export OMP_NUM_THREADS=1; $(PYTEST) -m 'not long and not server and not peers' -n auto $(QUEUE)

test-compiled: dev-env
	@echo "Compiling the Triton kernels for three generations of GPUs: what each became, and whether it lost anything."
	@echo "After a change of kernels, '$(PY) -m benchmarks.compiled --keep' writes benchmarks/compiled.json and saves the next run minutes."
	$(PY) -m benchmarks.compiled

test-servers: dev-env demo-model warm
	@echo "Running the tests against real servers, two at a time; each start takes a minute."
	@export OMP_NUM_THREADS=1; $(PYTEST) -m 'not long and (server or peers)' -n 2 $(QUEUE)

test-long: dev-env demo-model
	$(PY) -m pytest $(TESTS) --durations=10 -m long $(PYTEST_ARGS)

bench-quick: dev-env demo-model
	$(PY) -m benchmarks.quality.model_level --quick
	$(PY) -m benchmarks.kernels --trust
	$(PY) -m benchmarks.serving --quick

bench: dev-env demo-model
	$(PY) -m benchmarks.kernels
	$(PY) -m benchmarks.serving
	$(PY) -m benchmarks.latency
	$(PY) -m benchmarks.quality.model_level --budgets 128 256 512 1024
	$(PY) -m benchmarks.quality.precision
	$(PY) -m benchmarks.quality.attention_level
	$(PY) -m benchmarks.quality.drift
	$(PY) -m benchmarks.quality.tasks --samples $(BENCH_SAMPLES)
	$(PY) -m benchmarks.quality.turns
	$(PY) -m benchmarks.chat

# Installs nothing, for such machines often have no network: with $(PY) where it is there, else with the machine's Python and
# what GPU_SITE has (`make gpu-kit`).
GPU_PY ?= $(or $(wildcard $(PY)),$(PYTHON))
GPU_SITE ?= $(wildcard build/gpu-site)
GPU_ARGS ?=
test-gpu:
	PYTHONPATH='$(GPU_SITE)' HF_HUB_OFFLINE=1 $(GPU_PY) -m benchmarks.gpu $(GPU_ARGS)

# What a machine of Python 3.12, torch 2.11 and Triton 3.6 without a network lacks, as build/gpu-site.tar.xz.
gpu-kit:
	benchmarks/gpu/kit.sh build $(GPU_KIT_ARGS)

# Every kernel, in a short run. Without the caching allocator, else a read beyond a tensor ends in another one.
SANITIZED = tests/kernels/triton --device cuda -q -k 'chain_equals or dense_decode_equals or index_holds or duplicate_keys_are_labelled or as_a_cpu or either_tier'
sanitize: dev-env
	@find_tool() { command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer 2>/dev/null || \
		ls $(VENV)/lib/python3*/site-packages/nvidia/cu13/bin/compute-sanitizer 2>/dev/null; }; \
	find_tool >/dev/null || { $(PIP_INSTALL) 'nvidia-cuda-sanitizer-api>=13,<14'; } || exit; \
	for check in memcheck racecheck; do \
		echo "compute-sanitizer --tool $$check, kernels of this package"; \
		PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$$(find_tool)" --tool $$check --kernel-name kernel_substring=_kernel \
			--error-exitcode 9 $(PY) -m pytest $(SANITIZED) || exit; \
	done

soak: dev-env demo-model
	$(PY) -m benchmarks.soak $(SOAK_ARGS)

mutants: dev-env
	@echo "Breaking the engine, one rule at a time; the state machine must notice each. A few minutes."
	@$(PY) -m tests.support.mutants

# Another release's modules lie before this environment's; all else that they import is this environment's.
OTHER := build/sglang-$(SGLANG)
check: env $(if $(SGLANG),$(OTHER))
	$(if $(SGLANG),PYTHONPATH=$(OTHER):.) $(PY) -m sglang_clusterkv.tools.cli check

build/sglang-%: | $(PY)
	@$(PY) -m pip install --quiet --no-compile --no-deps --target $@.part 'sglang==$*' && mv $@.part $@

package: dev-env
	@rm -rf dist
	$(PY) -m build --no-isolation
	$(PY) -m pytest tests/test_package.py

lint: style types

style: dev-env
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(VENV)/bin/lint-imports --no-logo --no-cache

types: dev-env
	$(PY) -m mypy

clean:
	@if [ -e $(VENV)/.made-by-make ]; then rm -rf $(VENV); else rm -f $(VENV)/.installed $(VENV)/.installed-dev; fi
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find sglang_clusterkv tests examples -name __pycache__ -type d -prune -exec rm -rf {} +
