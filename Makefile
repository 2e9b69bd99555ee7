# Start with `make demo` and `make test`; `make .venv` only installs.
# TORCH_INDEX selects another build of torch, e.g. make demo TORCH_INDEX=https://download.pytorch.org/whl/cpu
PYTHON ?= python3
TORCH_INDEX ?=
BIN := .venv/bin
export TOKENIZERS_PARALLELISM := false

.PHONY: demo model emoji test test-slow test-gpu lint format layout typecheck docs clean

.venv: .venv/.installed
.venv/.installed: pyproject.toml configs/constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, this is " + sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(if $(TORCH_INDEX),$(BIN)/pip install -q torch -c configs/constraints.txt --index-url $(TORCH_INDEX))
	$(BIN)/pip install -q -e '.[train,eval]' -c configs/constraints.txt
	touch $@

.venv/.dev: .venv/.installed
	$(BIN)/pip install -q -e '.[dev]' -c configs/constraints.txt
	touch $@

# Tests run in several processes: spinning OpenMP threads would slow the others down by two orders of magnitude.
test test-slow: export OMP_WAIT_POLICY := PASSIVE
test test-slow: export OMP_NUM_THREADS := 1

demo: .venv/.installed
	$(BIN)/unitok demo

SCENES := $(BIN)/unitok data scenes --config configs/scenes/scenes.yaml --short-names
POSITIONS := --question-shares existence=3 count=2 colour=2 shape=1 --turns 3 --conversations 6 --ask-positions --partial-captions 6
SCENE_CODES := $(BIN)/unitok extract-codes --tokenizer runs/scenes/tokenizer/model

# Trains the shipped model (open_unitok/models/scenes): hours on 2 cores, resumable; results in runs/scenes/eval-bf16.
model: .venv/.installed
	$(BIN)/unitok demo --configs configs/scenes --out runs/scenes
	$(SCENES) --question-shares existence=3 count=3 colour=2 shape=2 position=3 relation=4 --pair-captions 6 --out runs/scenes/data2
	$(SCENE_CODES) --data 'runs/scenes/data2/train/*.tar' --out runs/scenes/codes2
	$(BIN)/unitok train configs/scenes/questions.yaml
	$(SCENES) $(POSITIONS) --pair-captions 6 --out runs/scenes/data3
	$(SCENE_CODES) --data 'runs/scenes/data3/train/*.tar' --out runs/scenes/codes3
	$(BIN)/unitok train configs/scenes/places.yaml
	$(SCENES) $(POSITIONS) --pair-captions 9 --reading-order --out runs/scenes/data4
	$(SCENES) $(POSITIONS) --pair-captions 9 --reading-order --max-objects 2 --train 16000 --out runs/scenes/data_pairs
	$(SCENE_CODES) --data 'runs/scenes/data4/train/*.tar' --out runs/scenes/codes4
	$(SCENE_CODES) --data 'runs/scenes/data_pairs/train/*.tar' --out runs/scenes/codes_pairs
	$(BIN)/unitok train configs/scenes/captions.yaml
	test runs/scenes/model -nt runs/scenes/captions/model || { rm -rf runs/scenes/model runs/scenes/replay_codes && \
	  $(BIN)/unitok convert bf16 runs/scenes/captions/model runs/scenes/model --guidance 2 --temperature 0.1; }
	$(BIN)/unitok extract-codes --tokenizer runs/scenes/model --data runs/scenes/data4/train/scenes-000000.tar --out runs/scenes/replay_codes
	$(BIN)/unitok data replay runs/scenes/model runs/scenes/replay_codes --kinds text_to_image=0.5 captioning=0.05 conversation=0.45 --samples 1300
	$(BIN)/unitok eval run all --model runs/scenes/model --data runs/scenes/data --out runs/scenes/eval-bf16

EMOJI_EVAL := $(BIN)/unitok eval run reconstruction emoji_reconstruction emoji emoji_questions --model runs/emoji/model

# Trains the shipped model of emoji (open_unitok/models/emoji): hours on 2 cores, resumable; npm fetches the images.
emoji: .venv/.installed
	$(BIN)/unitok data emoji --styles google twitter --out runs/emoji/data
	$(BIN)/unitok train configs/emoji/tokenizer.yaml
	$(BIN)/unitok extract-codes --tokenizer runs/emoji/tokenizer/model --data 'runs/emoji/data/train/*.tar' --out runs/emoji/codes
	$(BIN)/unitok train configs/emoji/mllm.yaml
	$(BIN)/unitok extract-codes --tokenizer runs/emoji/tokenizer/model --data 'runs/emoji/data/train/*.tar' --ten-crop --out runs/emoji/crops
	$(BIN)/unitok train configs/emoji/styles.yaml
	$(BIN)/unitok train configs/emoji/decoder.yaml
	test runs/emoji/model -nt runs/emoji/styles/model -a runs/emoji/model -nt runs/emoji/decoder/model || { rm -rf runs/emoji/model && $(BIN)/unitok convert bf16 runs/emoji/styles/model \
	  runs/emoji/model --unitok runs/emoji/decoder/model --guidance 1 --temperature 0.1; }
	$(BIN)/unitok eval run emoji emoji_questions --model runs/emoji/model --data runs/emoji/data/train --out runs/emoji/eval/train
	$(EMOJI_EVAL) --data runs/emoji/data/pairs --out runs/emoji/eval/pairs
	$(EMOJI_EVAL) --data runs/emoji/data/unseen --out runs/emoji/eval/unseen

test: .venv/.dev
	$(BIN)/python -m pytest -n 2 --durations 15

test-slow: .venv/.dev
	$(BIN)/python -m pytest -m 'slow and not gpu' --timeout 1500 --durations 0

# Needs a CUDA device; test-slow runs the same tests on an emulated one.
test-gpu: .venv/.dev
	$(BIN)/python -m pytest -m gpu tests/gpu

lint: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: .venv/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Type checkers and mkdocstrings do not follow the package-dir mapping: a copy has the import layout. Not links:
# pyright skips linked folders without a word.
layout:
	rm -rf build/layout && mkdir -p build/layout
	cp -r open_unitok build/layout/
	for p in tokenizer mllm generation training eval configs; do cp -r $$p build/layout/open_unitok/; done

typecheck: .venv/.dev layout
	$(BIN)/pyright

# The documentation site with the API reference; a warning is an error.
docs: .venv/.dev layout
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

clean:
	rm -rf build *.egg-info .pytest_cache .ruff_cache
