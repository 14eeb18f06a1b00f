# Everything runs from .venv, which every target makes by itself. `make help` lists the targets.

VENV  ?= .venv
STAMP := $(VENV)/.installed
VLLM_VENV    ?= .venv-vllm
VLLM_VERSION ?= 0.32.0
AIS_BENCH_VENV ?= .venv-ais-bench
MINUTES ?= 30
DEMO  ?= configs/examples/1p1d-cpu.toml

# The first of these that runs and is 3.11 or newer.
PYTHON ?= $(shell for p in python3.13 python3.12 python3.11 python3; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)

# ais_bench wants numpy 1, which no newer Python has.
AIS_BENCH_PYTHON ?= $(shell for p in python3.11 python3.12; do $$p -c '' 2>/dev/null && echo $$p && break; done)

.DEFAULT_GOAL := help
.PHONY: help install demo test test-vllm vllm-venv soak lint bench clean

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(firstword $(MAKEFILE_LIST)) | awk -F'\t' '{printf "make %-9s %s\n", $$1, $$2}'

install: $(STAMP) ## .venv with the commands in it (again when pyproject.toml or a native/ changes)

$(STAMP): pyproject.toml engine_adapter/cluster/install.py $(wildcard proxy/native/* sidecar/native/*)
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed: apt-get install python3 python3-venv, or make PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -I engine_adapter/cluster/install.py --venv $(VENV) --stamp $(STAMP)

demo: $(STAMP) ## one prefiller, one decoder and the proxy, and an answer; MODEL=DIR PORT=8000 DEMO_ARGS=--once DEMO=FILE.toml
	@$(VENV)/bin/pd-cluster demo $(DEMO) $(if $(MODEL),--model $(MODEL)) $(if $(PORT),--port $(PORT)) $(DEMO_ARGS)

# Its workers and the commands they start share what is compiled, whatever the environment says of writing it.
test: $(STAMP) ## every test; PYTEST_ARGS="-k proxy"
	@PYTHONDONTWRITEBYTECODE= $(VENV)/bin/python -m pytest -n 4 --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

test-vllm: $(STAMP) vllm-venv $(AIS_BENCH_VENV)/.installed ## real vLLM, split by our connector, and the benchmark recipes (CPU wheel in .venv-vllm, 20 minutes); VLLM_VENV=DIR
	@VLLM_VENV=$(abspath $(VLLM_VENV)) AIS_BENCH_VENV=$(abspath $(AIS_BENCH_VENV)) $(VENV)/bin/python -m pytest tests/vllm $(PYTEST_ARGS)

# An environment that you name is used as it is; ours is made anew when its recipe changes.
vllm-venv: $(if $(and $(filter-out file,$(origin VLLM_VENV)),$(wildcard $(VLLM_VENV)/bin/vllm)),,$(VLLM_VENV)/.installed)

$(VLLM_VENV)/.installed: tests/vllm/build_environment.py
	@$(PYTHON) -I tests/vllm/build_environment.py $(VLLM_VENV) --version $(VLLM_VERSION)

# Where it can't be had, its recipe's test is skipped and says so.
$(AIS_BENCH_VENV)/.installed: bench/recipes/ais_bench/requirements.txt
	@{ $(or $(AIS_BENCH_PYTHON),python3.11) -m venv $(@D) && $(@D)/bin/pip install --quiet -r $< && touch $@; } \
		|| echo "ais_bench can't be had here: its recipe is not tested" >&2

soak: $(STAMP) ## 2 prefillers and 2 decoders under load, one part killed or stopped every 20 s; MINUTES=30
	@$(VENV)/bin/python -m tests.integration.soak --minutes $(MINUTES)

lint: $(STAMP) ## ruff check, ruff format --check, mypy --strict
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

bench: $(STAMP) ## every benchmark with its bar: KV transfer, engine, policies, proxy
	@status=0; for words in kv_transfer kv_reshard layerwise_push "engine_throughput --size small" policy_simulator proxy_overhead; do \
		echo "python -m bench.$$words --check"; $(VENV)/bin/python -m bench.$$words --check || status=1; \
	done; exit $$status

clean: ## what was made, except .venv
	rm -rf .baton build dist bench/results .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
	find proxy sidecar engine_adapter bench tests -name __pycache__ -prune -exec rm -rf {} +
