# Two commands are all that a fresh machine with Python 3.11 needs:
#   make hello    installs into .venv and runs the whole pipeline on the toy world
#   make test     installs into .venv and runs the tests
# Longer, and not needed: make toy-seeds, make scaling, make real, make algorithms, make overoptimization,
# make torture, make slurm-test, make bench, make bench-gpu
PYTHON ?= python3.11
PY := .venv/bin/python
# processes that share the test files between them, a thread each: make test WORKERS=4
WORKERS ?= 2

.PHONY: hello test lint format toy-seeds scaling real algorithms overoptimization torture slurm-test bench bench-gpu

hello: .venv/installed
	./hello_world.sh

test: .venv/installed
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	OMP_NUM_THREADS=1 $(PY) -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder --durations=15 -m "not torture"

# each stage killed at random moments, 20 trials, and started again: the same bits (20 to 40 minutes)
torture: .venv/installed
	OMP_NUM_THREADS=1 $(PY) -m pytest tests/test_torture.py tests/test_resume.py
	OMP_NUM_THREADS=1 $(PY) -m pytest -m torture tests/test_lora.py tests/test_layout.py tests/test_get_smollm2.py \
	    tests/test_grpo.py tests/test_online_dpo.py

# the job scripts on a real Slurm of one machine (root, and Debian's packages; 10 to 20 minutes)
slurm-test: .venv/installed
	OMP_NUM_THREADS=1 $(PY) -m pytest --durations=0 tests/test_slurm.py

# the toy world on three seeds; its numbers in the README and docs/results.md (PRECISION=bf16 or LORA=1 make toy-seeds)
SUFFIX := $(if $(filter bf16,$(PRECISION)),_bf16)$(if $(filter 1,$(LORA)),_lora)
toy-seeds: .venv/installed
	for seed in 1 2 3; do SEED=$$seed ./hello_world.sh || exit 1; done
	$(PY) eval/hello_report.py --chains $(foreach seed,1 2 3,toy_small_seed$(seed)$(SUFFIX)) \
	    --raw_dirs $(foreach seed,1 2 3,data/toy_small_seed$(seed)$(SUFFIX)_raw) \
	    --name toy_seeds$(SUFFIX) --output_dir docs/images

# the scaling study: 4 sizes x 3 seeds on the harder toy world; goes on after a stop; SWEEP=1: learning rates, on seed 4
scaling: .venv/installed
	eval/scaling.sh

# real posts and a pretrained model of 135M parameters: make real POSTS=my/posts COMPARISONS=my/comparisons
real: .venv/installed
	eval/real.sh

# PPO, RLOO, GRPO, online DPO, DPO and best of n on the toy world, seeds 1 to 3; SWEEP=1: their learning rates, on seed 4
algorithms: .venv/installed
	eval/algorithms.sh

# PPO, RLOO and best of n against reward models of falling quality
overoptimization: .venv/installed
	eval/overoptimization.sh

# our stages beside TRL's trainers, in an environment of its own (80 minutes; goes on where it was stopped)
bench: .venv-bench/installed
	.venv-bench/bin/python benchmark/bench.py

# our stages on one GPU, by phase, at Pythia's shapes (at most 9 minutes; goes on where it was stopped; installs nothing)
bench-gpu:
	$(if $(wildcard $(PY)),$(PY),python3) benchmark/gpu.py

lint: .venv/installed
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

format: .venv/installed
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

.venv/installed: requirements.txt pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "error: PYTHON: found no '$(PYTHON)'; expected Python 3.11 (make PYTHON=...)" >&2; exit 2; }
	test -x $(PY) || $(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

.venv-bench/installed: requirements.txt benchmark/requirements.txt
	test -x .venv-bench/bin/python || $(PYTHON) -m venv .venv-bench
	.venv-bench/bin/python -m pip install --quiet --disable-pip-version-check -r benchmark/requirements.txt
	rm -rf .venv-bench/trl-ppo
	.venv-bench/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --target .venv-bench/trl-ppo trl==1.12.0
	touch $@
