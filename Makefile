# make demo and make test do all the set-up themselves, in an environment of their own.
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
BIN = $(VENV)/bin

RESULTS ?= bench/results
# Freed memory is kept, for every column alike: no page faults in the times of large mini-batches.
KEEP_MEMORY = MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=17179869184 MALLOC_TOP_PAD_=67108864
BENCH = $(BIN)/python -m pytest bench --benchmark-only --benchmark-quiet $(ARGS)

.PHONY: demo test test-library test-experiments test-interpreter test-ahead-of-time test-ptx test-avx512 lint sanitize bench bench-full clean

demo: $(VENV)/.ready
	$(BIN)/python -m lasem_fast demo $(ARGS)

# Triton reads TRITON_INTERPRET once, when it is imported: its tests need processes of their own.
test: $(VENV)/.ready
	$(MAKE) --no-print-directory --jobs=2 --keep-going --output-sync=line \
	test-library test-interpreter test-ahead-of-time test-experiments

# Two halves of what `pytest` runs, so that both cores have enough to do.
EXPERIMENTS = tests/test_experiments_*.py tests/test_comparators_*.py tests/test_datasets_*.py
test-library: $(VENV)/.ready
	$(BIN)/python -m pytest $(addprefix --ignore=,$(wildcard $(EXPERIMENTS))) $(ARGS)

test-experiments: $(VENV)/.ready
	$(BIN)/python -m pytest $(wildcard $(EXPERIMENTS)) $(ARGS)

test-interpreter: $(VENV)/.ready
	TRITON_INTERPRET=1 $(BIN)/python -m pytest tests/interpreter $(ARGS)

QUICK_PTX = instructions tensor_copies planted_bugs boxes
test-ahead-of-time: $(VENV)/.ready
	$(BIN)/python -m pytest tests/aot $(addprefix tests/ptx/test_,$(addsuffix .py,$(QUICK_PTX))) $(ARGS)

# What Triton compiled for sm_80 and sm_90, run on the host: all levels and heads take minutes.
test-ptx: $(VENV)/.ready
	$(BIN)/python -m pytest tests/ptx $(ARGS)

# A refused column fails the run, but the report of all others is still written.
bench: $(VENV)/.ready
	mkdir -p $(RESULTS)
	status=0; $(KEEP_MEMORY) $(BENCH) --benchmark-json=$(RESULTS)/quick.json || status=$$?; \
	$(BIN)/python -m bench.report $(RESULTS)/quick.json --plots $(RESULTS) && exit $$status

# Every row and column, with the allocator as it is and then with freed memory kept.
bench-full: $(VENV)/.ready
	mkdir -p $(RESULTS)
	status=0; $(BENCH) --suite full --benchmark-json=$(RESULTS)/full.json || status=$$?; \
	$(KEEP_MEMORY) $(BENCH) --suite full --benchmark-json=$(RESULTS)/full-kept.json || status=$$?; \
	$(BIN)/python -m bench.report $(RESULTS)/full.json $(RESULTS)/full-kept.json \
	--plots $(RESULTS) && exit $$status

lint: $(VENV)/.ready
	$(BIN)/pip install --quiet ruff==0.14.5
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# The C++ kernels' tests with the extension built under AddressSanitizer and UBSan, beside the
# package: the interpreter itself is not, so its runtime is loaded first and leaks are not looked for.
# Freed outputs are really freed there, so the test that they are used again is left out.
SANITIZERS = -fsanitize=address,undefined -fno-sanitize-recover=undefined
RUNTIMES = $(shell $(CXX) -print-file-name=libasan.so) $(shell $(CXX) -print-file-name=libubsan.so)
sanitize: $(VENV)/.ready
	CFLAGS="$(SANITIZERS)" LDFLAGS="$(SANITIZERS)" LASEM_FAST_REQUIRE_EXT=1 \
	$(BIN)/python setup.py --quiet build --build-lib build/sanitized --build-temp build/sanitized-objects
	LD_PRELOAD="$(RUNTIMES)" ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	PYTHONPATH=build/sanitized $(BIN)/pytest -o pythonpath=tests \
	--deselect tests/test_cpu_kernels.py::test_memory_of_outputs_is_used_again_and_given_back \
	tests/test_cpu_kernels.py tests/test_level_rows.py tests/test_cpu_level.py \
	tests/test_channels_last_linear.py tests/test_cpu_norm.py $(ARGS)

# The float32 kernels' AVX-512 forms on a CPU with AVX2 alone, instruction by instruction in SIMDe
# (Debian: libsimde-dev). The processes that one test starts would find the package itself.
test-avx512: $(VENV)/.ready
	CFLAGS="-mavx2 -mfma -DLASEM_EMULATE_AVX512 -I$(CURDIR)/tests/emulation" LASEM_FAST_REQUIRE_EXT=1 \
	$(BIN)/python setup.py --quiet build --build-lib build/emulated --build-temp build/emulated-objects
	LASEM_FAST_CPU_ISA=avx512 PYTHONPATH=build/emulated $(BIN)/pytest -o pythonpath=tests \
	--deselect tests/test_cpu_kernels.py::test_environment_chooses \
	tests/test_cpu_kernels.py tests/test_level_rows.py tests/test_cpu_level.py \
	tests/test_channels_last_linear.py tests/test_cpu_norm.py $(ARGS)

# torch comes first and by version, so that nothing else decides which build of it is taken.
$(VENV)/.ready: pyproject.toml setup.py $(wildcard csrc/cpu/*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check $(TORCH) "numpy<2.4" "setuptools>=77" wheel ninja
	$(BIN)/pip install --quiet --disable-pip-version-check --no-build-isolation --editable ".[test]"
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
