# make quickstart   raw text to a PPO-tuned chat model, 10 to 15 minutes on 2 cores
# make test         all tests
# make lint         ruff and mypy
# make peers        the environment of the libraries that benchmarks/ compares with, in .venv-peers
# make data-peers   the same for the benchmarks of data/, in .venv-data-peers
# Needs Python 3.11, pip, make and a C compiler. Everything is installed into .venv, from requirements-cpu.lock.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
# Written last: an interrupted installation has no marker and starts afresh; a changed lock makes a new one.
READY := $(VENV)/.ready

.PHONY: quickstart test lint install peers data-peers clean

quickstart: $(READY)
	$(VENV)/bin/roundhouse run recipes/quickstart.yaml

test: $(READY)
	$(VENV)/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

lint: $(READY)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

install: $(READY)

# torch goes first and alone, so that pip may choose its CPU build. The lock is complete, hence --no-deps: resolving would
# bring in torchvision and torchaudio, whose CUDA builds break transformers beside a CPU torch.
$(READY): requirements-cpu.lock pyproject.toml
	@echo "installing into $(VENV): about 4 GB, 3 to 5 minutes"
	rm -rf $(VENV)
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet torch==2.13.0
	$(VENV)/bin/pip install --quiet --no-deps -r requirements-cpu.lock
	$(VENV)/bin/pip install --quiet --no-deps --no-build-isolation -e .
	touch $@

peers: .venv-peers/.ready

.venv-peers/.ready: benchmarks/requirements-peers.txt
	rm -rf .venv-peers
	$(PYTHON) -m venv .venv-peers
	.venv-peers/bin/pip install --quiet torch==2.13.0
	.venv-peers/bin/pip install --quiet -r $<
	.venv-peers/bin/pip install --quiet --no-deps --target .venv-peers/trl-1.12 trl==1.12.0
	touch $@

data-peers: .venv-data-peers/.ready

.venv-data-peers/.ready: benchmarks/requirements-data-peers.txt
	rm -rf .venv-data-peers
	$(PYTHON) -m venv .venv-data-peers
	.venv-data-peers/bin/pip install --quiet -r $<
	touch $@

clean:
	rm -rf $(VENV) .venv-peers .venv-data-peers .pytest_cache .mypy_cache .ruff_cache .hypothesis
