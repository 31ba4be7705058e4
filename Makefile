# make demo | up | test | faults | image-deps | image-test | soak | thorough | bench | lint | mutants | lock | clean
PYTHON ?= python3
PY = .venv/bin/python
PARALLEL = -n 6 --dist loadgroup
CLIENT = $(PY) client.py --url {url} --workflow workflows/one_image.json --img workflows/photos/coffee.jpg

SCHEMA = .venv/bin/check-jsonschema --quiet --builtin-schema
SCRIPTS = start.sh image/custom_nodes.sh image/lock.sh local/venv.sh tests/image/deps.sh .ci/run .github/image_names.sh

.PHONY: demo up test faults image-deps image-test soak thorough bench lint mutants lock clean

demo: .venv/.installed ## one photograph through the whole stack; the picture lands in output/
	@$(PY) -m local -- $(CLIENT)

up: .venv/.installed ## the stack, until Ctrl-C; PORT=8000 fixes the API's port
	@$(PY) -m local --platform-port $(or $(PORT),0)

test: .venv/.installed-dev ## most tests wait for processes: several files at once, the longest first
	@$(PY) -m pytest $(PARALLEL) tests/process tests/contract tests/unit

faults: .venv/.installed-dev ## the rows of tests/process/FAULTS.md, whose column of seconds they fill in
	@rm -f .fault-seconds
	@FAULT_SECONDS=.fault-seconds $(PY) -m pytest $(PARALLEL) -m fault tests/process
	@$(PY) -m tests.process.fault_rows .fault-seconds

image-deps: ## a container engine for the image test, from the packages of Debian or Ubuntu; as root
	@tests/image/deps.sh

image-test: .venv/.installed-dev ## the image, built and booted by podman, with the stand-in as its ComfyUI; as root
	@$(PY) -m pytest --timeout 600 tests/image

soak: .venv/.installed-dev ## 500 jobs under random faults, two workers: a table; JOBS=100 for fewer
	@$(PY) -m tests.soak --jobs $(or $(JOBS),500)

thorough: .venv/.installed-dev ## 10,000 random inputs for the parser, 500 for the whole handler, with what became of them; random cuts
	@PARSER_EXAMPLES=10000 HANDLER_EXAMPLES=500 $(PY) -m pytest -s --hypothesis-show-statistics --timeout 900 \
		tests/unit/test_payload.py tests/unit/test_truncation.py tests/process/test_any_input.py

bench: .venv/.installed-dev ## the figures, a table each, and benchmarks/latest.json
	@$(PY) -m benchmarks

lint: .venv/.installed-dev
	@.venv/bin/ruff check .
	@.venv/bin/ruff format --check .
	@.venv/bin/mypy
	@.venv/bin/shellcheck $(SCRIPTS)
	@.venv/bin/shfmt -i 4 -ci -d $(SCRIPTS)
	@.venv/bin/hadolint Dockerfile
	@.venv/bin/zizmor --quiet --offline .github
	@$(SCHEMA) vendor.github-workflows .github/workflows/*.yml
	@$(SCHEMA) custom.github-workflows-require-timeout .github/workflows/*.yml
	@$(SCHEMA) vendor.dependabot .github/dependabot.yml
	@$(PY) -m pytest -q tests/unit/test_docs.py  # links, and the documents against the code
	@.venv/bin/pip check

mutants: .venv/.installed-dev ## takes out the nonce, the fsync, the wipe, ...: each time a test must turn red
	@$(PY) -m tests.mutants

lock: ## pins pyproject.toml's dependencies with hashes and without addresses; needs uv
	uv pip compile --universal --python-version 3.11 --generate-hashes --no-header --no-annotate -q pyproject.toml -o requirements.txt
	uv pip compile --universal --python-version 3.11 --generate-hashes --no-header --no-annotate -q --extra dev pyproject.toml -o requirements-dev.txt

clean:
	rm -rf .venv output .pytest_cache .hypothesis .mypy_cache .ruff_cache

.venv/.installed: requirements.txt
	@PYTHON=$(PYTHON) local/venv.sh requirements.txt && touch $@

.venv/.installed-dev: requirements-dev.txt
	@PYTHON=$(PYTHON) local/venv.sh requirements-dev.txt && touch .venv/.installed $@
