# make demo   tune the built-in demo (no GPU needed)
# make test   everything that CI checks
PYTHON ?= python3.11
BIN := .venv/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test test-ray format lint types imports unit bench bench-train-fn bench-search bench-control-plane \
	report-picture surfaces faults fault-table clean

demo: .venv/installed
	$(BIN)/python -m tuner.run

test: lint types imports unit

format: .venv/installed-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

lint: .venv/installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: .venv/installed-dev
	$(BIN)/mypy

imports: .venv/installed-dev
	$(BIN)/lint-imports

# Two files at a time, but those that start a Ray, which need the machine for themselves.
unit: .venv/installed-dev
	$(BIN)/pytest -m 'not ray and not faults' --numprocesses 2 --dist loadfile
	$(BIN)/pytest -m 'ray and not faults'

# The tests that start a Ray, under another version of it: make test-ray RAY=2.58.1
RAY ?= 2.58.1
test-ray: .venv-ray-$(RAY)/installed
	.venv-ray-$(RAY)/bin/pytest -m 'ray and not faults'

# Warm lanes against one TorchTrainer.fit() per trial; takes some minutes.
bench: .venv/installed-dev
	$(BIN)/python tests/benchmarks/bench_lanes.py

# The training function against Hugging Face's Trainer; on the demo, unless ARGS='--model FOLDER ...'.
bench-train-fn: .venv/installed-dev
	$(BIN)/python tests/benchmarks/bench_train_fn.py $(ARGS)

# The search against its rivals, replayed on the recorded surfaces; some minutes.
bench-search: .venv/installed-dev
	$(BIN)/python tests/benchmarks/bench_search.py $(ARGS)

# 64 lanes that only sleep, 2,000 trials: what the driver costs; about six minutes.
bench-control-plane: .venv/installed-dev
	$(BIN)/python tests/benchmarks/bench_control_plane.py $(ARGS)

# All that `make test` leaves out: what breaks something, or needs the machine for itself.
FAULTS := $(addprefix tests/integration/test_,faults.py failing_starts.py nodes.py postgresql.py)
faults: .venv/installed-dev
	$(BIN)/pytest -m faults

# The same, and deploy/FAULTS.md from what they note.
fault-table: .venv/installed-dev
	rm -f .fault-rows.jsonl
	FAULT_ROWS=.fault-rows.jsonl $(BIN)/pytest -m 'faults or not faults' $(FAULTS)
	$(BIN)/python tests/integration/fault_table.py .fault-rows.jsonl

# The README's picture of a report, of a run of the demo unless ARGS=RUN; needs Debian's chromium-driver.
report-picture: .venv/installed-dev
	$(BIN)/python tests/integration/report_picture.py $(ARGS)

# Record the planned surfaces that are not there yet; about ten minutes each.
surfaces: .venv/installed-dev
	$(BIN)/python tests/benchmarks/record_surface.py --all

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(PIP) --editable .
	touch $@

.venv/installed-dev: .venv/installed
	$(PIP) --editable '.[dev]'
	touch $@

# As .venv, but for Ray.
.venv-ray-%/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(@D)
	grep --invert-match '^ray==' constraints.txt > $(@D)/constraints.txt
	$(@D)/bin/pip install --quiet --disable-pip-version-check --constraint $(@D)/constraints.txt \
		--editable '.[dev]' 'ray[default,train,tune]==$*'
	touch $@

clean:
	rm -rf .venv .venv-ray-* build *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
