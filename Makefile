# Every verb of the project, the same for people and for CI; `make` alone lists them. GNU make 3.81 is enough.
#
#   PYTHON=python3.12   what to make environments with; otherwise the newest of python3.13, 3.12 and 3.11, otherwise uv
#   VENV=.venv          the environment to make and use; VENV=0 uses the active one as it is (a conda CuPy serves),
#                       and then only `make install VENV=0` installs anything
#   GPUSAVER_CPU=1      leave the CUDA extra out even where nvidia-smi reports a driver
#   OUTPUT=build/demo   where `make demo` writes
#   OUT=build/gpu-session  where `make gpu-session` writes; also taken from the environment

PYTHON ?=
VENV ?= .venv
OUTPUT = build/demo
OUT ?= build/gpu-session

.DEFAULT_GOAL := help
.NOTPARALLEL:
.SUFFIXES:
.PHONY: help install demo test test-tf test-lowest test-torch check test-gpu test-faults fuzz bench bench-gpu bench-scale bench-mpi
.PHONY: gpu-session bench-upload bench-incremental bench-damage bench-quick bench-more bench-growth bench-interference nightly docs
.PHONY: package first-visit docker-test protos clean
.PHONY: active require-gpu require-tf

SYSTEM := $(shell uname -sm)
ifeq ($(filter Linux Darwin,$(SYSTEM)),)
$(error gpusaver is developed on Linux, or on macOS without CUDA, and this system is neither: on Windows use WSL 2)
endif

export PIP_DISABLE_PIP_VERSION_CHECK = 1

ifeq ($(VENV),0)
PY := $(or $(PYTHON),python3)
READY := active
export PYTHONPATH := $(CURDIR)$(if $(PYTHONPATH),:$(PYTHONPATH))
else
PY := $(VENV)/bin/python
READY := $(VENV)/.installed
endif

# Programs that come in wheels lie beside the interpreter, or in the PATH like it.
BIN := $(if $(findstring /,$(PY)),$(dir $(PY)))
VALID := $(BIN)check-jsonschema --quiet --builtin-schema vendor.

# TensorFlow and the peers of the benchmark pin their own NumPy and protobuf: each has an environment of its own.
TF_PY := .venv-tf/bin/python
BENCH_PY := .venv-bench/bin/python
ORBAX_PY := .venv-orbax/bin/python
FUZZ_PY := .venv-fuzz/bin/python
LOWEST_PY := .venv-lowest/bin/python
# The real published network that tests/tf reads: PyPI's wheel, which pip checks against the hash in basic-pitch.txt.
BASIC_PITCH := $(CURDIR)/.venv-tf/wheels/basic_pitch-0.4.0-py2.py3-none-any.whl

ifeq ($(SYSTEM),Linux x86_64)
TF_READY := .venv-tf/.installed
endif

# ---------------------------------------------------------------------------------------------------- environments

# $(call make_venv,DIRECTORY): leaves one whose Python runs as it is, but for a missing pip. A candidate must run (the shim
# of a version manager may not), be new enough, and bring ensurepip (Debian splits it off).
define make_venv
@if ! $(1)/bin/python -c '' 2>/dev/null; then \
    rm -rf $(1); \
    for python in $(if $(PYTHON),"$(PYTHON)",python3.13 python3.12 python3.11); do \
        if "$$python" -c 'import sys, ensurepip, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
            echo "$(1): made with $$python"; exec "$$python" -m venv $(1); \
        fi; \
    done; \
    if [ -n "$(PYTHON)" ]; then \
        echo "PYTHON=$(PYTHON) does not run, is older than 3.11 or lacks venv: name another, or none." >&2; exit 1; \
    elif command -v uv >/dev/null 2>&1; then \
        echo "$(1): made with uv"; exec uv venv --quiet --seed --python '>=3.11,<3.14' $(1); \
    fi; \
    echo "Install Python 3.11, 3.12 or 3.13 with venv (Debian and Ubuntu: apt install python3-venv; macOS: brew install" \
        "python@3.13), or name one with PYTHON=." >&2; \
    exit 1; \
fi
@$(1)/bin/python -m pip --version >/dev/null 2>&1 || $(1)/bin/python -m ensurepip >/dev/null
endef

# 12, 13 or nothing: the CUDA major to install for. A driver runs what was built for its own and for any older major; an
# environment that has a CuPy keeps it, since two break each other.
define cuda_major
$$( \
    [ "$(GPUSAVER_CPU)" != 1 ] || exit 0; \
    major=$$(nvidia-smi 2>/dev/null | sed -n 's/.*CUDA [A-Za-z ]*Version: *\([0-9][0-9]*\).*/\1/p' | head -n 1); \
    [ "$${major:-0}" -ge 12 ] || exit 0; \
    ! $(PY) -c 'import importlib.util as u, sys; sys.exit(u.find_spec("cupy") is None)' || exit 0; \
    if [ "$$major" -ge 13 ]; then echo 13; else echo 12; fi \
)
endef

# The demo trains on CuPy and so needs cuBLAS and the rest of the toolkit, which saving and restoring do not.
define pip_install_dev
@cuda=$(cuda_major); package=".[dev$${cuda:+,cuda$$cuda}]"; \
echo "$(PY): installing $$package$${cuda:+ with the CUDA $$cuda toolkit}"; \
$(PY) -m pip install --quiet -e "$$package" $${cuda:+"cupy-cuda$${cuda}x[ctk]"}
endef

$(VENV)/.installed: pyproject.toml
	$(call make_venv,$(VENV))
	$(pip_install_dev)
	@touch $@

.venv-tf/.installed: pyproject.toml tests/tf/requirements.txt tests/tf/basic-pitch.txt
	$(call make_venv,.venv-tf)
	@$(TF_PY) -c 'import sys; sys.exit(sys.version_info >= (3, 14))' || { \
	    rm -r .venv-tf; echo "TensorFlow needs Python 3.11, 3.12 or 3.13: name one with PYTHON=." >&2; exit 1; }
	@echo ".venv-tf: installing gpusaver[test] and TensorFlow"
	@$(TF_PY) -m pip install --quiet -e '.[test]' -r tests/tf/requirements.txt
	@$(TF_PY) -m pip download --quiet --no-deps --ignore-requires-python --require-hashes \
	    --dest .venv-tf/wheels -r tests/tf/basic-pitch.txt
	@touch $@

.venv-bench/.installed: pyproject.toml benchmarks/requirements.txt
	$(call make_venv,.venv-bench)
	@echo ".venv-bench: installing gpusaver[test] and the libraries it is measured against"
	@$(BENCH_PY) -m pip install --quiet -e '.[test]' -r benchmarks/requirements.txt
	@touch $@

.venv-orbax/.installed: benchmarks/requirements-orbax.txt
	$(call make_venv,.venv-orbax)
	@echo ".venv-orbax: installing Orbax"
	@$(ORBAX_PY) -m pip install --quiet -r benchmarks/requirements-orbax.txt
	@touch $@

.venv-fuzz/.installed: pyproject.toml tests/fuzz/requirements.txt
	$(call make_venv,.venv-fuzz)
	@echo ".venv-fuzz: installing gpusaver[snappy] and atheris"
	@$(FUZZ_PY) -m pip install --quiet -e '.[snappy]' -r tests/fuzz/requirements.txt
	@touch $@

# The oldest release of everything that pyproject.toml allows, on the oldest Python.
.venv-lowest/.installed: pyproject.toml | $(READY)
	@echo ".venv-lowest: installing the oldest releases that gpusaver[test] allows"
	@$(PY) -m uv venv --quiet --clear --python 3.11 .venv-lowest
	@$(PY) -m uv pip install --quiet --python $(LOWEST_PY) --resolution lowest-direct -e '.[test]'
	@touch $@

active:
	@$(PY) -c 'import google.protobuf, fastcrc, ml_dtypes, numpy, pynvml' || { \
	    echo "The active environment lacks what gpusaver needs: make install VENV=0 installs it there." >&2; exit 1; }

require-gpu:
	@nvidia-smi --list-gpus 2>/dev/null | grep -q GPU || { \
	    echo "This needs an NVIDIA GPU and its driver, and nvidia-smi reports none on this machine." >&2; exit 1; }

require-tf:
	@[ -n "$(TF_READY)" ] || { \
	    echo "This needs tensorflow-cpu, which is tested on Linux x86-64 alone; this is $(SYSTEM)." >&2; exit 1; }

# ----------------------------------------------------------------------------------------------------------- verbs

help:            ## list the verbs
	@sed -n 's/^\([a-z-]*\):.*## */\1	/p' Makefile | expand -t 14

ifeq ($(VENV),0)
install:
	$(pip_install_dev)
else
install: $(READY)  ## make .venv and install gpusaver, its tools and the fitting CUDA extra
endif

demo: $(READY)   ## train, get killed, resume: ends with the numbers of a run that was never killed
	@$(PY) examples/train_digits.py --output $(OUTPUT)

test: $(READY)   ## the tests that need neither TensorFlow nor a GPU
	$(PY) -m pytest -n 2 --ignore tests/tf --ignore tests/gpu

test-tf: require-tf $(TF_READY)  ## against TensorFlow, in an environment of its own (Linux x86-64)
	GPUSAVER_BASIC_PITCH=$(BASIC_PITCH) $(TF_PY) -m pytest tests/tf

test-lowest: .venv-lowest/.installed  ## `test` on Python 3.11 with the oldest releases that pyproject.toml allows
	$(LOWEST_PY) -m pytest -n 2 --ignore tests/tf --ignore tests/gpu

test-torch: .venv-bench/.installed  ## PyTorch: the adapter, the example, the guide; in the environment of the benchmarks
	$(BENCH_PY) -m pytest tests/test_torch.py tests/test_examples.py tests/test_readme.py \
	    tests/test_bench_gpu_sim.py::test_dcp_saves_again_and_again

check: $(READY)  ## lint, format, types, layers, generated messages, workflows, Dockerfile, documentation
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(PY) -c 'from importlinter.cli import lint_imports_command; lint_imports_command()'
	$(PY) proto/generate.py --check
	$(PY) tools/check_kernels.py
	$(BIN)actionlint
	$(BIN)zizmor --offline --quiet .github
	$(BIN)hadolint docker/Dockerfile
	$(VALID)github-workflows .github/workflows/*.yml
	$(VALID)github-issue-forms .github/ISSUE_TEMPLATE/bug.yml .github/ISSUE_TEMPLATE/wish.yml
	$(VALID)github-issue-config .github/ISSUE_TEMPLATE/config.yml
	$(VALID)dependabot .github/dependabot.yml
	$(VALID)compose-spec docker/compose.yaml
	$(VALID)citation-file-format CITATION.cff
	@$(MAKE) docs

test-gpu: require-gpu $(READY)   ## the tests on an NVIDIA GPU
	GPUSAVER_REQUIRE_GPU=1 $(PY) -m pytest tests/gpu

# For a machine that is lent for ten minutes: both, cut down, each with an end; whatever happens to the first, the second runs.
gpu-session: require-gpu $(READY)  ## the essential part of test-gpu and bench-gpu, together under nine minutes
	@mkdir -p "$(OUT)"
	@GPUSAVER_REQUIRE_GPU=1 timeout -k 5 150 $(PY) -m pytest tests/gpu --rounds 20 -k 'not racecheck and not synccheck' \
	    --junitxml "$(OUT)/test-gpu.xml" >"$(OUT)/test-gpu.log" 2>&1; tests=$$?; tail -n 40 "$(OUT)/test-gpu.log"; \
	OUT="$(OUT)" timeout -k 5 380 $(PY) benchmarks/bench_gpu.py --essential --seconds 330 --trace "$(OUT)"; bench=$$?; \
	echo "gpu-session: tests $$tests, benchmark $$bench, in $(OUT)"; [ $$tests = 0 ] && [ $$bench = 0 ]

bench: .venv-bench/.installed .venv-orbax/.installed $(TF_READY)  ## measure against torch.save, DCP, safetensors, np.savez, Orbax and TensorFlow
	$(BENCH_PY) benchmarks/bench.py
	$(BENCH_PY) benchmarks/bench_compat.py

bench-quick: .venv-bench/.installed  ## the same in a minute: smaller, with fewer peers
	$(BENCH_PY) benchmarks/bench.py --quick

bench-more: .venv-bench/.installed  ## other workloads: 100,000 tensors, one of 4 GB, scalars between, Fortran order
	$(BENCH_PY) benchmarks/bench.py --more

bench-growth: .venv-bench/.installed  ## saves and restores of 10^2 to 10^6 tensors, and of 1 MB to 8 GB
	$(BENCH_PY) benchmarks/growth.py

bench-interference: $(READY)  ## a training loop beside a save that drains
	$(PY) benchmarks/interference.py

bench-scale: $(READY)  ## plan, merge and commit of 4,096 ranks and 1,000,000 tensors, without their bytes
	$(PY) benchmarks/scale/scale.py

bench-mpi: $(READY)  ## four ranks against one process with four writers
	OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 PATH="$(dir $(PY)):$$PATH" \
	    mpiexec -n 4 --map-by :oversubscribe --bind-to none $(PY) benchmarks/mpi_throughput.py

bench-gpu: require-gpu $(READY)  ## measure on an NVIDIA GPU
	$(PY) benchmarks/bench_gpu.py

test-faults: $(READY)  ## the long runs of faults, kills, damage and fuzzing; prints the counts of docs/guarantees.md
	GPUSAVER_FAULTS=long $(PY) -m pytest -n 2 tests/faults tests/fuzz tests/saver/test_failures.py \
	    tests/saver/test_processes.py tests/test_damage.py tests/mpi/test_faults.py tests/mpi/test_killed_ranks.py tests/mpi/test_resharding.py tests/remote

FUZZ_SECONDS ?= 60
fuzz: .venv-fuzz/.installed  ## fuzz every reader with atheris, FUZZ_SECONDS each (Linux x86-64)
	@for target in index v1 state meta object_graph strings; do \
	    $(FUZZ_PY) tests/fuzz/fuzz.py $$target $(FUZZ_SECONDS) || exit 1; done

bench-upload: $(READY)  ## saves to an S3 server on loopback beside obstore's own put (Linux x86-64)
	$(PY) benchmarks/bench_upload.py

bench-incremental: $(READY)  ## saves of a state of which 90 % do not change
	$(PY) benchmarks/bench_incremental.py

bench-damage: .venv-bench/.installed .venv-orbax/.installed $(TF_READY)  ## damage and kill gpusaver, its peers and Orbax
	$(BENCH_PY) benchmarks/damage_peers.py

nightly: $(READY)  ## test and test-tf with many more examples; PyTorch; 2 GB converted; mutants, coverage; oldest releases, packages, containers
	PYTEST_ADDOPTS=--hypothesis-profile=nightly $(MAKE) test test-tf
	$(MAKE) test-torch
	$(BENCH_PY) benchmarks/bench.py --quick --peers gpusaver,torch.save --rounds 5 --ahead 1.2
	$(PY) benchmarks/memory_convert.py
	$(PY) -m pytest -n 2 -m mutations tests/test_mutations.py
	$(PY) tools/cuda_coverage.py
	$(MAKE) test-lowest package first-visit docker-test

docs: $(READY)   ## build/docs/index.html, warnings being errors
	$(PY) -m sphinx -q -W --keep-going -b html docs build/docs

package: $(READY)  ## dist/: the wheel and the source distribution, checked, and the wheel installed and imported
	rm -rf dist build/package
	$(PY) -m build
	$(PY) -m twine check --strict dist/*
	$(PY) tools/check_package.py dist
	$(PY) -m venv build/package
	build/package/bin/python -m pip install --quiet dist/*.whl
	cd build && package/bin/python ../tools/import_time.py

docker-test:     ## build docker/Dockerfile, run the demo and the CPU tests in it; with buildah where no Docker engine runs
	docker/test.sh

first-visit:     ## pip install and the tutorial's commands in fresh environments of every Python from 3.11 on that is here
	tools/first_visit.sh

protos: $(READY)  ## generate gpusaver/protos from proto/ (Python 3.11 or 3.12)
	$(PY) proto/generate.py

clean:           ## remove what was built; the environments stay: rm -r .venv*
	rm -rf build dist .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find . -path './.venv*' -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
