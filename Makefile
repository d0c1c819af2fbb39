# Evergreen. `make help` says what there is; every target sets up what it needs.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PACK ?= flight_delay
# The flights are those of 2013; other packs run as of now.
ifeq ($(PACK),flight_delay)
AS_OF ?= 2013-04-01
endif
UV_VERSION := 0.13.8
# uv does not read pip's setting for wheels that lie in a folder.
export UV_FIND_LINKS ?= $(PIP_FIND_LINKS)
# Compiled modules halve every import; an environment that forbids them would slow each task.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help run up down image stack stack-down stack-test backup restore upgrade test faults lint prove new-pack check lock bench clean
# Of the stack: wheels to be taken before the index's when its image is built, and where its secrets are.
export EVERGREEN_WHEELS ?= $(or $(firstword $(wildcard $(PIP_FIND_LINKS))),config/wheels)
export EVERGREEN_SECRETS ?= ./secrets
OVERLAYS := $(if $(GPU),-f docker-compose.gpu.yaml) $(if $(ENGINE),-f docker-compose.engine.yaml) $(if $(TLS),-f docker-compose.tls.yaml)
COMPOSE := docker compose $(if $(strip $(OVERLAYS)),-f docker-compose.yaml $(OVERLAYS))
HOST := $(or $(if $(TLS),$(EVERGREEN_HOST)),127.0.0.1)
HTTP := http$(if $(TLS),s)
ifdef ENGINE
export DOCKER_SOCKET ?= /var/run/docker.sock
export DOCKER_GROUP ?= $(shell stat -c %g $(DOCKER_SOCKET))
endif

help:  ## this text
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/\t/' | expand -t 12

$(VENV)/.ready: requirements.txt pyproject.toml
	@test -x $(BIN)/uv && $(BIN)/uv --version | grep -qF $(UV_VERSION) || { \
	  echo "set-up: a virtual environment in $(VENV)"; \
	  $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Evergreen needs Python 3.11 or newer: make PYTHON=python3.11 …"; exit 1; }; \
	  $(PYTHON) -m venv $(VENV) && $(BIN)/python -m pip install -q --disable-pip-version-check uv==$(UV_VERSION); }
	@echo "set-up: locked packages (once, about a minute)"
	@$(BIN)/uv pip install -q --python $(BIN)/python --compile-bytecode -r requirements.txt
	@$(BIN)/uv pip install -q --python $(BIN)/python --no-deps -e .
	@touch $@

$(VENV)/.ready-dev: $(VENV)/.ready requirements-dev.txt
	@echo "set-up: development packages"
	@$(BIN)/uv pip install -q --python $(BIN)/python --compile-bytecode -r requirements-dev.txt
	@touch $@

$(VENV)-peers/.ready: $(VENV)/.ready requirements-peers.txt
	@echo "set-up: peers of the benchmarks"
	@$(BIN)/uv venv -q --clear --python $(BIN)/python $(VENV)-peers
	@$(BIN)/uv pip install -q --python $(VENV)-peers/bin/python -r requirements-peers.txt
	@touch $@

run: $(VENV)/.ready  ## train the pack end to end: make run [PACK=flight_delay] [AS_OF=2013-04-01]
	@$(BIN)/evergreen run $(PACK) $(if $(AS_OF),--as-of $(AS_OF))

up: $(VENV)/.ready  ## Airflow (UI, scheduler, triggerer) and the MLflow UI, on loopback
	@$(BIN)/evergreen up

down: $(VENV)/.ready  ## stop what `make up` started
	@$(BIN)/evergreen down

image:
	@owner=$$($(PYTHON) config/make_secrets.py $(EVERGREEN_SECRETS) $(if $(TLS),--tls $(HOST))) && touch $(EVERGREEN_SECRETS)/image.env && export EVERGREEN_UID=$$owner \
	  && export EVERGREEN_REVISION=$$(git describe --always --abbrev=40 --dirty --exclude '*' 2>/dev/null) \
	  && $(COMPOSE) build init store && tag=$${EVERGREEN_TAG:-$$(sed -n s/^EVERGREEN_TAG=//p .env)} \
	  && echo "EVERGREEN_IMAGE=$$(docker image inspect --format '{{.Id}}' "$$tag")" > $(EVERGREEN_SECRETS)/image.env

stack: image  ## the platform as a team runs it, in containers: build, make the secrets, start, wait (GPU=1: with GPUs; ENGINE=1: jobs in containers; TLS=1: by https)
	@$(COMPOSE) up --detach --wait --remove-orphans
	@echo "Airflow $(HTTP)://$(HOST):$(or $(AIRFLOW_PORT),8080) (people: $(EVERGREEN_SECRETS)/airflow_users) · MLflow $(HTTP)://$(HOST):$(or $(MLFLOW_PORT),5000) ($(EVERGREEN_SECRETS)/mlflow_users)"

stack-down:  ## stop the stack; its data stay, in named volumes
	@$(COMPOSE) down --remove-orphans
	@docker ps --all --quiet --filter label=evergreen.engine=$(or $(COMPOSE_PROJECT_NAME),evergreen)_jobs | xargs -r docker rm --force >/dev/null

backup:  ## all that the stack keeps, into backups/, at one consistent point: make backup [TO=FOLDER]
	@$(PYTHON) config/backup.py make $(or $(TO),backups)

restore:  ## a backup into a stack that has no volumes yet: make restore FROM=backups/20260101T000000Z
	@test -n "$(FROM)" || { echo "which: make restore FROM=backups/…"; exit 2; }
	@$(PYTHON) config/backup.py restore $(FROM)
	@$(MAKE) --no-print-directory stack

upgrade: image backup  ## a backup, then the stack from these files: new images, databases brought up to date
	@$(COMPOSE) stop  # else what is old would go on writing to tables that are being changed
	@$(MAKE) --no-print-directory stack

stack-test: $(VENV)/.ready-dev  ## bring a stack up from nothing, use it, break it, and take it away again
	@$(BIN)/python -m pytest -m stack -p no:randomly -s --timeout 3600 tests/stack $(ARGS)
	@$(if $(ARGS),,$(BIN)/python -m pytest tests/contract/test_containers.py tests/contract/test_engine.py tests/contract/test_runtimes.py tests/e2e/test_containers.py)

new-pack: $(VENV)/.ready  ## a working pack to start from: make new-pack NAME=churn
	@test -n "$(NAME)" || { echo "name it: make new-pack NAME=churn"; exit 2; }
	@$(BIN)/evergreen new $(NAME)

check: $(VENV)/.ready  ## check a pack before its first run: make check PACK=digits [AS_OF=2026-01-01]
	@$(BIN)/evergreen check $(PACK) $(if $(AS_OF),--as-of $(AS_OF))

test: lint  ## lint, then the tests; of the fault tests a sample
	@$(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder -m "not fault and not prove and not gpu and not stack" $(ARGS)

faults: $(VENV)/.ready-dev  ## the tests that are too long for make test: faults, and a person at a browser
	@$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "fault and not prove and not stack" $(ARGS)

lint: $(VENV)/.ready-dev  ## ruff, mypy --strict, and who may import whom
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

prove: $(VENV)/.ready-dev  ## large trial counts; figures go to docs/LOG.md by hand
	@$(BIN)/python -m pytest -m "prove" -p no:randomly --timeout 3600 $(ARGS)

bench: $(VENV)/.ready-dev $(VENV)-peers/.ready  ## every claim of speed and quality, beside its peer
	@for file in benchmarks/*.py; do echo "== $$file"; $(BIN)/python $$file || exit 1; done

lock: $(VENV)/.ready  ## requirements.txt from requirements.in, requirements-dev.txt from requirements-dev.in
	@$(BIN)/uv pip compile -q --universal --python-version 3.11 --generate-hashes --custom-compile-command "make lock" requirements.in -o requirements.txt
	@printf 'torch==2.13.0\n    # no hash: see requirements.in\n' >> requirements.txt
	@$(BIN)/uv pip compile -q --universal --python-version 3.11 --generate-hashes --custom-compile-command "make lock" requirements-dev.in -o requirements-dev.txt
	@$(BIN)/uv pip compile -q --universal --python-version 3.11 --generate-hashes --custom-compile-command "make lock" requirements-peers.in -o requirements-peers.txt

clean: down  ## remove the embedded home: data, models and runs
	@rm -rf var
