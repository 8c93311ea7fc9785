# make demo | test | check | drills | fuzz | bench | protos | docs | site
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Most tests wait for processes: two files of them at a time, in the order of tests/conftest.py, the shortest last.
PARALLEL ?= -n 2 --dist loadfile --no-loadscope-reorder
PROTOS := $(wildcard protos/v1/*.proto)

.PHONY: demo test check drills fuzz bench protos docs site clean

demo: $(VENV)/.ready
	$(BIN)/enginehouse up demo=examples/demo-model -- $(BIN)/enginehouse generate "In the beginning" --model demo --max-tokens 96 --stats

test: $(VENV)/.ready
	$(BIN)/python -m pytest $(PARALLEL)

drills: $(VENV)/.ready
	$(BIN)/python -m pytest -m drill $(PARALLEL)

# Another seed sends other messages; hypothesis tries other examples every time.
fuzz: $(VENV)/.ready
	$(BIN)/python -m pytest --hypothesis-profile=default $$(grep -l "import given" tests/unit/*.py)
	FUZZ_MESSAGES=1000000 FUZZ_SEED=$(or $(FUZZ_SEED),1) $(BIN)/python -m pytest tests/unit/test_fuzz.py

check: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy examples/high_level/llm_examples.py examples/low_level/llama.py examples/low_level/llama_multi_gpu.py examples/low_level/llama_quantize.py
	$(BIN)/lint-imports
	@tmp=$$(mktemp -d) && $(MAKE) --no-print-directory protos docs OUT=$$tmp && \
	  for file in $$(cd $$tmp && find protos docs -type f); do cmp -s $$tmp/$$file $$file || { echo "$$file is not up to date: make $${file%%/*}"; exit 1; }; done && rm -r $$tmp

# CHECKPOINT: a directory in Hugging Face layout; the bounds in bench/cpu.py are for one of half a billion parameters.
# GGUF: files of the same model for llama.cpp, if llama-cpp-python is installed.
CHECKPOINT ?= examples/demo-model
GGUF ?=
bench: $(VENV)/.ready
	PYTHONPATH=. $(BIN)/python bench/cpu.py $(CHECKPOINT) $(GGUF:%=--gguf %)
	PYTHONPATH=. $(BIN)/python bench/overhead.py
	PYTHONPATH=. $(BIN)/python bench/gateway.py
	PYTHONPATH=. $(BIN)/python bench/gateway.py --tls
	$(BIN)/python -m bench.llm
	PYTHONPATH=. $(BIN)/python bench/checkpoint.py

OUT ?= .
protos: $(VENV)/.ready
	@$(BIN)/python -m grpc_tools.protoc -I . --python_out=$(OUT) --grpc_python_out=$(OUT) \
	  --plugin=protoc-gen-mypy=$(BIN)/protoc-gen-mypy --plugin=protoc-gen-mypy_grpc=$(BIN)/protoc-gen-mypy_grpc \
	  --mypy_out=quiet:$(OUT) --mypy_grpc_out=quiet:$(OUT) $(PROTOS)

docs: $(VENV)/.ready
	@mkdir -p $(OUT)/docs
	@$(BIN)/python docs/make_api.py $(OUT)/docs/api.md
	@$(BIN)/python docs/make_cli.py $(OUT)/docs/cli.md

# docs/ as a site, in site/.
site: $(VENV)/.ready
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

$(VENV)/.ready: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build dist site *.egg-info
