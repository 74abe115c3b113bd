# Headrace: few commands. `make serve` and `make test` are all a newcomer needs.

.DEFAULT_GOAL := help
VENV := .venv
BIN := $(VENV)/bin
ARGS ?=
export PYTHONUNBUFFERED := 1

# Everything the wheel is made of: when none of it is newer than the stamp, nothing is built.
SOURCES := $(shell find router launcher bench/client proto server -type f \
	\( -name '*.rs' -o -name '*.toml' -o -name '*.py' -o -name '*.proto' -o -name '*.cpp' -o -name '*.h' -o -name '*.html' -o -name '*.css' -o -name '*.js' -o -name flags.txt \) \
	-not -path '*/tests/*' -not -path '*/_native/*') \
	$(wildcard launcher/data/scripts/*) \
	Cargo.toml Cargo.lock pyproject.toml tools/install.sh tools/constraints.txt

.PHONY: help install serve test test-clients image-check check fix bench gpu clean

help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 16

install: $(VENV)/.headrace ## build and install the server into .venv

$(VENV)/.headrace: $(SOURCES)
	@tools/install.sh

serve: install ## serve the default model on port 3000 (ARGS="--model-id ... --port ...")
	@exec $(BIN)/headrace $(ARGS)

test: install ## everything that needs no GPU
	@tools/install.sh extra test
	@tools/test.sh

test-clients: install ## what needs other people's programs and clients
	@tools/install.sh extra test
	@tools/test_clients.sh

image-check: ## the Dockerfile's steps in clean Debian roots, as root (ARGS="--target cuda ...")
	@python3 tools/image_check.py $(ARGS)

check: install ## formatters, lints, types, arrows
	@tools/install.sh extra test
	@tools/install.sh extra check
	@tools/check.sh

fix: ## format everything
	@tools/install.sh extra check
	cargo fmt --all
	$(BIN)/ruff format server integration-tests bench tools
	$(BIN)/ruff check --fix server integration-tests bench tools

gpu: install ## what needs a CUDA device, and a table of it
	@tools/install.sh extra test
	@tools/gpu.sh $(ARGS)

bench: install ## what can be measured (bench/README.md says the rest)
	@$(BIN)/headrace bench $(or $(ARGS),--help)

clean: ## forget the environment and the build
	rm -rf $(VENV) target .cache server/headrace/_native server/headrace/_triton
