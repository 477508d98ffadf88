# `make demo` trains and distils a small model here; `make test` runs every check. Both install what is missing.
PYTHON ?= python3.11
# Installed before the rest, which would take any build. PyPI has the CUDA build under this version; the CPU build is
# much smaller: make demo TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"
TORCH ?= torch==2.13.0

BIN := .venv/bin
INSTALLED := .venv/installed

.PHONY: demo demo-baseline demo-vlm demo-phone install test test-slurm chaos hangs mutants lint clean benchmarks benchmark-step benchmark-whole benchmark-scale \
	benchmark-data benchmark-save gpu-check eval-full

demo: $(INSTALLED)
	$(BIN)/python -m alignkd.demo --out demo

# The same student without a teacher, for a fair comparison; needs the demo's data and tower.
demo-baseline: $(INSTALLED)
	$(BIN)/python -m alignkd.demo --out demo --baseline

# The same task for a tiny SmolVLM: teacher, student alone, distilled student.
demo-vlm: $(INSTALLED)
	$(BIN)/python -m alignkd.demo --vlm --out demo-vlm

# The same task for a student that llama.cpp runs, its GGUF exports, and their answers.
demo-phone: $(INSTALLED)
	$(BIN)/python -m alignkd.demo --phone --out demo-phone

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	@echo "installing into .venv; this takes some minutes on a slow line"
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet -c constraints.txt $(TORCH)
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# tests/slurm start a real four-node Slurm here (root; Debian: slurmctld slurmd slurm-client munge). Without it they are
# skipped, and say so; with CI=true they fail. Two workers share the test modules (tests/parallel.py); a plain
# `pytest` runs one test after another.
test: lint
	$(BIN)/pytest -n 2

# Only the Slurm tests, about ten minutes.
test-slurm: $(INSTALLED)
	$(BIN)/pytest tests/slurm

# Kill a small run again and again at random, resume it, compare it with an undisturbed run (about 15 s a
# kill on 2 cores): make chaos KILLS=10 SEED=1 CHAOS="--set student.zero_stage=3"
KILLS ?= 100
chaos: $(INSTALLED)
	$(BIN)/python -m tests.chaos --kills $(KILLS) $(if $(SEED),--seed $(SEED)) $(CHAOS)

# Break the product in one place after another, and see that a test notices each (10 to 25 minutes on 2 cores):
# make mutants ONLY=alignkd/losses
mutants: $(INSTALLED)
	$(BIN)/python -m tests.mutants $(if $(ONLY),--only $(ONLY))

# Stop a random rank at a random moment, again and again: each run must name it, and end like an undisturbed one (about
# two minutes a stop on 2 cores): make hangs STOPS=3 SEED=1
STOPS ?= 20
hangs: $(INSTALLED)
	$(BIN)/python -m tests.hangs --stops $(STOPS) $(if $(SEED),--seed $(SEED))

# All six benchmarks at full size, made up; the evaluation is killed, resumed and compared: make eval-full SHARE=0.01
SHARE ?= 1
RANKS ?= 1
eval-full: $(INSTALLED)
	$(BIN)/python -m tests.evaluate.full_size --share $(SHARE) --ranks $(RANKS)

# Measurements, on a quiet machine; all but benchmark-save write their tables into docs/performance.md.
benchmarks: benchmark-step benchmark-whole benchmark-scale benchmark-data

benchmark-step: $(INSTALLED)
	$(BIN)/python -m benchmarks.step --publish

benchmark-whole: $(INSTALLED)
	$(BIN)/python -m benchmarks.whole --publish

benchmark-scale: $(INSTALLED)
	$(BIN)/python -m benchmarks.scale --publish

benchmark-data: $(INSTALLED)
	$(BIN)/python -m benchmarks.data --publish

benchmark-save: $(INSTALLED)
	$(BIN)/python -m benchmarks.save

# The first minutes on a GPU: make gpu-check MINUTES=5
MINUTES ?= 9
gpu-check: $(INSTALLED)
	$(BIN)/python -m benchmarks.gpu --minutes $(MINUTES) --publish

clean:
	rm -rf .venv build dist .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path './.git/*' -prune -exec rm -rf {} +
