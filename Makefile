# Every target sets up what it needs on a fresh machine: Python 3.10 or newer, make and git are all that is assumed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: setup quickstart test lint bench bench-encoders distorted results clean
setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("ssmclip needs Python 3.10 or newer; name one with: make PYTHON=python3.12")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev]' --constraint constraints.txt
	touch $@

quickstart: setup  ## train two small CLIPs on embedded data, evaluate them, write runs/quickstart/report.html
	$(BIN)/python -m ssmclip quickstart --recipe recipes/quickstart.py --out runs/quickstart

test: setup lint  ## everything
	$(BIN)/python -m pytest

lint: setup
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/lint-imports

# Where the runs of recipes/flickr8k.py, the data sets and the two tables of Geirhos et al. are.
RUNS ?= CLIP-VMamba-Nano=runs/flickr8k,CLIP-ViT-Nano=runs/flickr8k-vit
DATA ?= ../shared/data
TABLES ?= --amplitude $(DATA)/ood/golden/mean_power_spectrum_grey.npy --gamma $(DATA)/ood/golden/x_gamma_function.npy
distorted: setup  ## accuracy over the level of 12 distortions, two runs, as rows in results/: an hour on one core
	for name in flickr8k cifar10; do OMP_NUM_THREADS=1 $(BIN)/ssmclip evaluate --model $(RUNS) --data $(DATA) \
	  --tasks distorted:$$name $(TABLES) --max-images 1000 --examples 0 --out results/distorted_$$name.jsonl; done

bench: setup  ## ours against peers, as rows in results/
	$(BIN)/python benchmarks/scan.py --out results/scan.jsonl
	$(BIN)/python benchmarks/text.py --out results/text.jsonl

bench-encoders: setup  ## whole image encoders, ours and timm's, as rows in results/
	$(BIN)/python benchmarks/encoders.py --out results/encoders.jsonl

clean:
	rm -rf $(VENV) build src/*.egg-info .pytest_cache .ruff_cache

# The rows behind the README's results; `make results` writes them into it.
README_ROWS := results/flickr8k.jsonl results/quickstart.jsonl
results: setup
	$(BIN)/ssmclip report $(README_ROWS) --out runs/results --readme README.md
	$(BIN)/ssmclip models > runs/models.md
	sed -i -e '/<!-- models -->/,/<!-- \/models -->/{//!d}' -e '/<!-- models -->/r runs/models.md' README.md
