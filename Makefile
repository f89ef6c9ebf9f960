# make demo: ALOHA in MuJoCo through real ROS 2 topics, driven by the shipped checkpoint. EPISODES=2 stops after two.
# make train: one policy for three robots, from demonstrations to reinforcement learning.
# make test: every check, as CI runs it; ARGS=test/sim runs only those tests. Both set everything up in .venv first and are quick the second time.
SHELL := /bin/bash
EPISODES ?= 0
SEED ?= 0
ARGS ?=
BIN := .venv/bin
# Tests of running graphs, which wait for promised times: alone. All others share the processors.
TIMED := test/faults test/ros test/launch test/serving test/dashboard
# The ROS 2 wheels do not set this; ROS tools and ament_index look their packages up through it.
export AMENT_PREFIX_PATH := $(CURDIR)/.venv$(if $(AMENT_PREFIX_PATH),:$(AMENT_PREFIX_PATH))

.PHONY: demo test lint train faults setup clean
setup:
	@scripts/setup.sh

demo: setup
	@$(BIN)/qwen-vla up aloha --sim --record --episodes $(EPISODES) --seed $(SEED) $(ARGS)

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

test: lint
	@scripts/setup.sh --browser
ifeq ($(ARGS),)
	$(BIN)/python -m pytest -n logical --maxprocesses 8 --dist loadfile test $(addprefix --ignore=,$(TIMED))
	$(BIN)/python -m pytest $(TIMED)
else
	$(BIN)/python -m pytest $(ARGS)
endif

# Everything that may go wrong with a running robot, in real processes: what is promised, and what was measured.
faults: setup
	@$(BIN)/python scripts/faults.py $(ARGS)

# One policy for three robots from nothing, every stage; goes on where it was interrupted.
train: setup
	@training/generalist.sh

clean:
	rm -rf .venv build install log .pytest_cache .mypy_cache .ruff_cache *.egg-info
