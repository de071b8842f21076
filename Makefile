# Every target sets up what it needs on a fresh machine: Python 3.10 or newer, make and git are all that is assumed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: setup quickstart test lint docs release-check clean results figure demo-model
.PHONY: bench bench-encoders bench-roofline bench-evaluate bench-distortions bench-embedder bench-probes bench-loader bench-startup bench-hessian bench-gpu
.PHONY: scan-needed controlled-pair eval26 captions distorted hessian efficiency timm-tests
setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml setup.py constraints.txt
	$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("ssmclip needs Python 3.10 or newer; name one with: make PYTHON=python3.12")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev,docs]' --constraint constraints.txt
	touch $@

quickstart: setup  ## train two small CLIPs on embedded data, evaluate them, write runs/quickstart/report.html
	$(BIN)/python -m ssmclip quickstart --recipe recipes/quickstart.py --out runs/quickstart

# Two processes take one test file after another; OpenMP threads that wait sleep, so that the other process can run.
test: setup lint  ## everything
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest --numprocesses 2 --dist loadfile

lint: setup
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/lint-imports

# Not --quiet: it silences warnings before --strict counts them.
docs: setup  ## the site, in build/site, with warnings as errors
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

release-check: setup  ## a wheel and a source distribution, checked, installed and used
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python .ci/release_check.py

clean:
	rm -rf $(VENV) build src/*.egg-info .pytest_cache .ruff_cache

# The rows behind docs/results.md and docs/claims.md; `make results` writes them, and the table of docs/models.md.
RESULTS_ROWS := results/flickr8k.jsonl results/quickstart.jsonl
CLAIMS_ROWS := $(addprefix results/,$(addsuffix .jsonl,eval26 ood ood_flickr8k distorted_cifar10 distorted_flickr8k \
	hessian efficiency captions scan_needed))
results: setup
	$(BIN)/ssmclip report $(RESULTS_ROWS) --out runs/results --readme docs/results.md
	$(BIN)/ssmclip report $(CLAIMS_ROWS) --claims docs/claims.md
	$(BIN)/ssmclip models > runs/models.md
	sed -i -e '/<!-- models -->/,/<!-- \/models -->/{//!d}' -e '/<!-- models -->/r runs/models.md' docs/models.md

demo-model: setup  ## the model that `ssmclip demo` opens with, into src/ssmclip/demo/model: five minutes on one core
	OMP_NUM_THREADS=1 $(BIN)/ssmclip train recipes/demo.py --out runs/demo
	$(BIN)/python -m ssmclip.demo.packaged runs/demo

figure: setup  ## the README's figure, from rows
	$(BIN)/python docs/figure.py results/efficiency.jsonl docs/cost.svg

timm-tests: setup  ## timm's and open_clip's own tests on our models, from the source distributions that pip can get
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/timm_tests.py --out results/timm_tests.jsonl

# Speed, as rows in results/, against peers in the same process.

bench: setup  ## the scans and the text towers, ours against peers
	$(BIN)/python benchmarks/scan.py --out results/scan.jsonl
	$(BIN)/python benchmarks/text.py --out results/text.jsonl
	$(BIN)/python benchmarks/text.py --out results/text_24_layers.jsonl --layers 24 --only pass=forward

bench-encoders: setup  ## whole image encoders, ours and timm's
	$(BIN)/python benchmarks/encoders.py --out results/encoders.jsonl
	$(BIN)/python benchmarks/encoders.py --precision bfloat16 --out results/encoders_bfloat16.jsonl
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/encoders.py --only training --out results/training_step.jsonl

bench-roofline: setup  ## the machine's peaks, and how near the CPU kernels come to them
	$(BIN)/python benchmarks/roofline.py --out results/roofline.jsonl

bench-evaluate: setup  ## evaluation against its encoder alone, prompts sorted by length
	$(BIN)/python benchmarks/evaluate.py --out results/evaluate.jsonl

bench-distortions: setup  ## distortions against their plain definitions
	$(BIN)/python benchmarks/distortions.py --out results/distortions.jsonl

bench-embedder: setup  ## the embedder against the bare encoder, texts sorted and not
	$(BIN)/python benchmarks/embedder.py --out results/embedder.jsonl

bench-probes: setup  ## probes on 10,000 embeddings against scikit-learn
	$(BIN)/python benchmarks/probes.py --out results/probes.jsonl

bench-loader: setup  ## training that reads its images against the training step alone
	$(BIN)/python benchmarks/loader.py --out results/loader.jsonl

bench-startup: setup  ## seconds until a command answers, over those of `import torch`
	$(BIN)/python benchmarks/startup.py --out results/startup.jsonl

bench-hessian: setup  ## a Hessian-vector product against a gradient
	$(BIN)/python benchmarks/hessian.py --out results/hessian_cost.jsonl

# Rows go to results/gpu_CARD.jsonl, named after the GPU; without a GPU to results/gpu.jsonl.
bench-gpu: setup  ## the Triton kernels on a GPU, or smaller in Triton's interpreter
	$(BIN)/python benchmarks/gpu.py

# What trained models do, as rows in results/. RUNS: runs of recipes/flickr8k.py, or any models; DATA: the data sets;
# TEXTS and TOKENIZER: captions as JSON lines, and the tokenizer.json of the Mamba language models.
RUNS ?= CLIP-VMamba-Nano=runs/flickr8k,CLIP-ViT-Nano=runs/flickr8k-vit
DATA ?= ../shared/data
TEXTS ?= $(DATA)/longcaps/*/data.jsonl
TOKENIZER ?= $(DATA)/tokenizers/20B_tokenizer.json
# It is an error if the file has rows from different settings: remove it to start over.

scan-needed: setup  ## six encoders, three seeds each, with and without a scan: an hour on two cores
	$(BIN)/python benchmarks/scan_needed.py train
	$(BIN)/python benchmarks/scan_needed.py evaluate --data $(DATA)
	$(BIN)/python benchmarks/scan_needed.py compare

controlled-pair: setup  ## three encoders, five recipes, three seeds in CLIPs: an hour on one core
	SSMCLIP_DATA=$(DATA) $(BIN)/python benchmarks/controlled_pair.py measure
	$(BIN)/python benchmarks/controlled_pair.py compare

eval26: setup  ## every data set found under DATA
	$(BIN)/ssmclip evaluate --model $(RUNS) --tasks found --data $(DATA) --workers 2 --examples 0 --out results/eval26.jsonl

captions: setup  ## how many words of a caption the text towers see
	$(BIN)/ssmclip captions --model CLIP-VMamba-S,CLIMP-Mamba1 --texts $(TEXTS) --tokenizer $(TOKENIZER) --out results/captions.jsonl

# The two tables are those of Geirhos et al.
TABLES ?= --amplitude $(DATA)/ood/golden/mean_power_spectrum_grey.npy --gamma $(DATA)/ood/golden/x_gamma_function.npy
distorted: setup  ## accuracy over the level of 12 distortions: an hour on one core
	for most in flickr8k=1000 cifar10=300; do name=$${most%=*}; \
		OMP_NUM_THREADS=1 $(BIN)/ssmclip evaluate --model $(RUNS) --data $(DATA) --tasks distorted:$$name $(TABLES) \
		--max-images $${most#*=} --examples 0 --out results/distorted_$$name.jsonl || exit 1; \
	done

# Five eigenvalues of largest magnitude: of the image towers, after and during training; of the text towers and whole
# models; and by power iteration, on some batches as the paper does it and on one until it converges. Works batch by batch
# and continues where it was stopped: two and a half hours on one core.
HESSIAN := analyze hessian --data '$(DATA)/captions/train/{00000..00005}.tar' --batch-size 15 --towers image \
	--which magnitude --weight-decay 0 --out results/hessian.jsonl
hessian: setup  ## Hessian spectra of two runs
	for run in $$(echo $(RUNS) | tr , ' '); do \
		one="--label $${run%=*} --model $${run#*=}"; \
		$(BIN)/ssmclip $(HESSIAN) $$one --batches 60 && \
		$(BIN)/ssmclip $(HESSIAN) $$one --batches 8 --towers text,whole && \
		$(BIN)/ssmclip $(HESSIAN) $$one --batches 8 --protocol park-kim && \
		$(BIN)/ssmclip $(HESSIAN) $$one --batches 1 --protocol lanczos,park-kim,power --max-products 600 \
			--out results/hessian_power.jsonl && \
		$(BIN)/ssmclip $(HESSIAN) $$one --batches 2 --along-training || exit 1; \
	done

# Finished measurements are skipped: remove the file to repeat them. An hour on two idle cores.
COUNTED := vmamba_tiny_s1l8,vmamba_base_s2l15,vit_base_patch16_224,swin_tiny_patch4_window7_224,mambaout_tiny,CLIP-VMamba-T220,CLIP-VMamba-S,CLIP-SiMBA-L,CLIP-MambaOut-T
SIZES := --sizes 224,448,672,896,1024
efficiency: setup  ## CLIMP's question: operations, memory and time of VMamba-B and ViT-B/16, as rows in results/
	$(BIN)/ssmclip analyze efficiency --model $(COUNTED) --count-only --out results/efficiency.jsonl
	$(BIN)/ssmclip analyze efficiency --model CLIP-VMamba-B,CLIP-ViT-B-16 $(SIZES) --lengths 77,256,1024 --out results/efficiency.jsonl
	$(BIN)/ssmclip analyze efficiency --model CLIMP-VMamba-T-Mamba-130m --sizes '' --lengths 77,256,1024 --out results/efficiency.jsonl
	$(BIN)/ssmclip analyze efficiency --model CLIP-ViT-B-16 $(SIZES) --attention plain --out results/efficiency.jsonl
