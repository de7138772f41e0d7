# One command per thing a newcomer or the build machine does. `make quickstart` needs only Python 3.11 to 3.13.
PYTHON ?= python3
VENV := .venv
PARITY := .venv-parity
BIN := $(VENV)/bin
# The CPU is what is tested; a GPU or TPU that happens to be there must not change the numbers.
export JAX_PLATFORMS ?= cpu

.PHONY: quickstart demo test parity lint clean

quickstart: $(VENV)/installed  ## a tiny model learns column addition; minutes on two cores
	rm -rf runs/quickstart
	$(BIN)/rljax sft configs/quickstart.yaml --model.path ""
	$(BIN)/rljax train configs/quickstart.yaml
	@echo "next: the same on a real model and real problems:  make demo"

demo: $(VENV)/demo  ## real SmolLM2-135M on real GSM8K problems, three steps
	test -d runs/smollm2 || $(BIN)/rljax convert demo:smollm2 runs/smollm2
	$(BIN)/rljax train configs/smollm2-gsm8k.yaml
	test -d runs/smollm2-gsm8k/hf || $(BIN)/rljax convert runs/smollm2-gsm8k runs/smollm2-gsm8k/hf

test: $(VENV)/dev
	$(BIN)/python -m pytest -q

parity: $(PARITY)/installed  ## against transformers on torch, in an environment of its own
	$(PARITY)/bin/python -m pytest -q tests/parity

lint: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

clean:
	rm -rf $(VENV) $(PARITY) runs .pytest_cache .ruff_cache .hypothesis build *.egg-info

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: pyproject.toml | $(VENV)/bin/python
	$(BIN)/pip install --quiet --disable-pip-version-check -e .
	touch $@

$(VENV)/demo: $(VENV)/installed
	$(BIN)/pip install --quiet --disable-pip-version-check -e ".[demo]"
	touch $@

$(VENV)/dev: $(VENV)/installed
	$(BIN)/pip install --quiet --disable-pip-version-check -e ".[dev]"
	touch $@

# torch first and by version: what depends on it would bring the CUDA build.
$(PARITY)/installed: pyproject.toml
	$(PYTHON) -m venv $(PARITY)
	$(PARITY)/bin/pip install --quiet --disable-pip-version-check torch==2.13.0
	$(PARITY)/bin/pip install --quiet --disable-pip-version-check -e ".[dev,demo]" accelerate
	touch $@
