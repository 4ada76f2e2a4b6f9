# Two commands on a fresh machine with Python 3.10+: `make demo` and `make test`. Each makes .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip
STAMP := $(VENV)/.installed
TOOLS := $(VENV)/.tools
OLDER := .venv-older
FRAMEWORKS := .venv-frameworks
COMPOSER := .venv-composer
SERVERS := $(VENV)/.servers
CLIENTS := $(VENV)/.clients
FUZZER := $(VENV)/.fuzzer
AZURITE = azurite@$(shell sed -n 's/^azurite==//p' constraints.txt)
# Torch's store asks the name server who connects, and answers no rank meanwhile: not for long where that is silent.
RUN := PYTHONUNBUFFERED=1 DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 RES_OPTIONS="timeout:1 attempts:1"

.PHONY: composer demo docs-commands docs-errors faults frameworks fuzz kills test test-all test-composer test-frameworks test-launchers test-older test-pythons servers check bench bench-fetch bench-restore bench-restore-ratios bench-counts bench-checksums bench-dcp bench-export bench-tensors bench-local bench-cuda bench-files bench-latency clean

demo: $(STAMP)
	$(RUN) $(BIN)/python -m rankload demo

test: $(STAMP)
	$(RUN) $(BIN)/python -m pytest -q -n 4 --dist loadfile --no-loadscope-reorder tests

# The long tests too, every pair of ZeRO settings at 1 to 8 ranks (docs/benchmarks.md), and every other source into
# every target (docs/formats.md): more than an hour on 2 cores.
test-all: $(STAMP)
	$(RUN) TEST_ALL=1 $(BIN)/python -m pytest -q -n 3 --dist loadfile --no-loadscope-reorder tests
	$(RUN) $(BIN)/python -m benchmarks.reshard_matrix
	$(RUN) $(BIN)/python -m benchmarks.sources_matrix

# What jobs of real frameworks saved, restored into jobs without them: transformers' Trainer, Accelerate, Lightning and
# torchtitan, in an environment of their own.
frameworks: $(FRAMEWORKS)/.installed

test-frameworks: $(FRAMEWORKS)/.installed
	$(RUN) FRAMEWORKS_PYTHON=$(abspath $(FRAMEWORKS))/bin/python $(BIN)/python -m pytest -q tests/frameworks

# Jobs of the real Composer, in an environment of its own: its Trainer, and its State.
composer: $(COMPOSER)/.installed

test-composer: $(COMPOSER)/.installed
	$(RUN) COMPOSER_PYTHON=$(abspath $(COMPOSER))/bin/python $(BIN)/python -m pytest -q \
		tests/launch/integrations/test_composer.py
	$(RUN) $(COMPOSER)/bin/python -m pytest -q tests/test_composer.py

# Whole jobs under torchrun, deepspeed, mpirun and Slurm, which are killed and restarted; those that are not installed
# are skipped.
test-launchers: $(STAMP)
	$(RUN) TEST_LAUNCHERS=1 $(BIN)/python -m pytest -q -m whole_jobs tests

# With the DeepSpeed of a year before, and with each version's checkpoints in the other's engines.
test-older: $(OLDER)/.installed
	$(RUN) $(OLDER)/bin/python -m pytest -q tests/loader/targets/deepspeed/test_engine.py \
		tests/loader/targets/deepspeed/test_reshard.py tests/loader/targets/test_module_reshard.py
	$(RUN) OLDER_PYTHON=$(abspath $(OLDER))/bin/python $(BIN)/python -m pytest -q tests/test_versions.py

# The tests with each of these interpreters that is here, each in an environment of its own.
PYTHONS ?= python3.10 python3.12 python3.13
test-pythons:
	for python in $(PYTHONS); do \
		version=$$($$python -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2> /dev/null) \
			|| { echo "$$python is not here: not tried"; continue; }; \
		$(MAKE) test PYTHON=$$python VENV=.venv-$$version || exit 1; \
	done

# Real servers, and the clients that reach them, for the tests that are skipped without.
servers: $(SERVERS)

check: $(TOOLS)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf .cache/rankload && mkdir -p .cache/rankload/launch
	ln -s ../../rankload/__init__.py ../../rankload/__main__.py ../../rankload/py.typed ../../distributed ../../loader \
		../../launch/integrations .cache/rankload/
	ln -s $$(ls -d launch/* | grep -v integrations | sed 's|^|../../../|') .cache/rankload/launch/
	MYPYPATH=.cache $(BIN)/mypy --strict -p rankload

bench: $(STAMP)
	$(RUN) $(BIN)/python -m benchmarks

bench-fetch: $(SERVERS) $(CLIENTS)
	$(RUN) $(BIN)/python -m benchmarks.fetch --write docs/benchmarks.md

bench-restore: $(SERVERS)
	$(RUN) $(BIN)/python -m benchmarks.fetch_restore --params 143 --write docs/benchmarks.md

bench-restore-ratios: $(SERVERS)
	$(RUN) $(BIN)/python -m benchmarks.fetch_restore --ratios --params 60 --rounds 7 --write docs/benchmarks.md

bench-counts: $(SERVERS)
	$(RUN) $(BIN)/python -m benchmarks.fetch_counts --params 143 --write docs/benchmarks.md

bench-checksums: $(SERVERS)
	$(RUN) $(BIN)/python -m benchmarks.checksums --write docs/benchmarks.md

bench-dcp: $(SERVERS)
	$(RUN) $(BIN)/python -m benchmarks.dcp --write docs/benchmarks.md

bench-tensors: $(STAMP)
	$(RUN) $(BIN)/python -m benchmarks.many_tensors --write docs/benchmarks.md

bench-local: $(CLIENTS)
	$(RUN) $(BIN)/python -m benchmarks.local --write docs/benchmarks.md

bench-cuda: $(STAMP)
	$(RUN) $(BIN)/python -m benchmarks.cuda --write docs/benchmarks.md

bench-files: $(STAMP)
	$(RUN) $(BIN)/python -m benchmarks.many_files --write docs/benchmarks.md

bench-latency: $(SERVERS)
	$(RUN) $(BIN)/python -m benchmarks.latency --write docs/benchmarks.md

# The second takes 20 GB on the disk of TMPDIR for a while.
bench-export: $(STAMP)
	$(RUN) $(BIN)/python -m benchmarks.export --write docs/benchmarks.md
	$(RUN) $(BIN)/python -m benchmarks.export --sparse 20 --write docs/benchmarks.md

# What the commonest mistakes are answered with, made by running each: a section of docs/errors.md.
docs-errors: $(STAMP)
	$(RUN) $(BIN)/python tests/support/mistakes.py

# What each command prints, made by running it: the examples of docs/commands.md.
docs-commands: $(STAMP)
	$(RUN) $(BIN)/python tests/support/commands_page.py

# Every parser of bytes from storage, and whole loads, against hostile input: a table in docs/reliability.md. Three hours.
# What is found is kept in out/fuzz. `make fuzz SECONDS=60 SEED=7 TARGETS="tar http-load"` does some of it.
SECONDS ?= 600
SEED ?= 0
TARGETS ?=
fuzz: $(FUZZER)
	$(RUN) RANKLOAD_CACHE_HOME=disk $(BIN)/python tests/support/fuzz.py --seconds $(SECONDS) --seed $(SEED) \
		$(if $(TARGETS),,--write docs/reliability.md) $(TARGETS)

# Every fault at every stage of loads, saves, resumes and exports, on two nodes of two ranks: the table in
# docs/reliability.md. Nodes are real (network namespaces) where this is root's and iproute2 is there. Half an hour on 2
# cores; `make faults ONLY='restore / .* / SIGKILL'` runs some, and writes nothing.
faults: $(STAMP)
	$(RUN) TEST_FAULTS=1 $(BIN)/python tests/faults/matrix.py \
		$(if $(ONLY),--only '$(ONLY)',--write docs/reliability.md)
	$(if $(ONLY),,$(RUN) TEST_FAULTS=1 $(BIN)/python -m pytest -q tests/faults/test_outages.py)

# Saves that are killed at 50 points each, and what autoresume makes of what is left: a table in docs/resuming.md. Half
# an hour on 2 cores.
kills: $(FRAMEWORKS)/.installed
	$(RUN) $(BIN)/python tests/support/killed_saves.py --points 50 --write docs/resuming.md

clean:
	rm -rf $(VENV) .venv-* .cache build dist *.egg-info

# torch comes first: the build that the constraints name then satisfies everybody else's range.
# DeepSpeed compiles nothing (DS_BUILD_OPS=0), and where it cannot be installed the demo and the tests say so.
$(STAMP): setup.cfg setup.py pyproject.toml constraints.txt rankload/__init__.py
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install -q --disable-pip-version-check -c constraints.txt torch numpy "setuptools>=69" wheel
	$(PIP) install -q --disable-pip-version-check --no-build-isolation -c constraints.txt -e ".[test,zstd]"
	DS_BUILD_OPS=0 $(PIP) install -q --disable-pip-version-check -c constraints.txt deepspeed \
		|| echo "deepspeed could not be installed: its tests are skipped, and the demo runs on fixtures"
	touch $@

$(TOOLS): $(STAMP)
	$(PIP) install -q --disable-pip-version-check -c constraints.txt -e ".[check]" --no-build-isolation
	touch $@

$(SERVERS): $(STAMP)
	$(PIP) install -q --disable-pip-version-check -c constraints.txt -e ".[servers]" --no-build-isolation
	npm install --silent --no-audit --no-fund --prefix $(VENV)/servers $(AZURITE) \
		|| echo "azurite could not be installed: the tests of Azure Blob are skipped"
	touch $@

$(CLIENTS): $(STAMP)
	$(PIP) install -q --disable-pip-version-check -c constraints.txt -e ".[bench]" --no-build-isolation
	touch $@

# Inputs are guided by coverage where atheris can be had: it is made for few versions of Python.
$(FUZZER): $(STAMP)
	$(PIP) install -q --disable-pip-version-check -c constraints.txt -e ".[fuzz]" --no-build-isolation \
		|| echo "atheris could not be installed: inputs are not guided by coverage"
	touch $@

PURELIB := -c 'import sysconfig; print(sysconfig.get_path("purelib"))'

# All that .venv has, and the frameworks. torchtitan needs triton, which is for few machines: the others do without.
$(FRAMEWORKS)/.installed: $(STAMP) constraints-frameworks.txt
	rm -rf $(FRAMEWORKS)
	$(BIN)/python -m venv --without-pip $(FRAMEWORKS)
	echo "import site; site.addsitedir('$$($(BIN)/python $(PURELIB))')" \
		> "$$($(FRAMEWORKS)/bin/python $(PURELIB))/newer.pth"
	$(FRAMEWORKS)/bin/python -m pip install -q --disable-pip-version-check -c constraints.txt \
		-c constraints-frameworks.txt transformers accelerate lightning
	$(FRAMEWORKS)/bin/python -m pip install -q --disable-pip-version-check -c constraints.txt \
		-c constraints-frameworks.txt torchtitan torchdata triton \
		|| echo "torchtitan could not be installed: its tests are skipped"
	touch $@

# All that .venv has, and Composer with what it needs. It asks for an older torch with its torchvision, of several GB:
# the tests run it with the torch of .venv, and stand in for torchvision and mcli, which they make no use of.
$(COMPOSER)/.installed: $(STAMP) constraints-composer.txt
	rm -rf $(COMPOSER)
	$(BIN)/python -m venv --without-pip $(COMPOSER)
	echo "import site; site.addsitedir('$$($(BIN)/python $(PURELIB))')" \
		> "$$($(COMPOSER)/bin/python $(PURELIB))/newer.pth"
	$(COMPOSER)/bin/python -m pip install -q --disable-pip-version-check --no-deps -c constraints-composer.txt mosaicml
	$(COMPOSER)/bin/python -m pip install -q --disable-pip-version-check -c constraints.txt \
		-c constraints-composer.txt coolname importlib-metadata packaging pillow psutil py-cpuinfo pyyaml requests \
		tabulate torch-optimizer torchmetrics
	touch $@

# All that .venv has, and before it the older DeepSpeed.
$(OLDER)/.installed: $(STAMP) constraints-older.txt
	rm -rf $(OLDER)
	$(BIN)/python -m venv --without-pip $(OLDER)
	DS_BUILD_OPS=0 $(PIP) install -q --disable-pip-version-check --no-build-isolation --no-deps \
		--target "$$($(OLDER)/bin/python $(PURELIB))" -r constraints-older.txt
	echo "import site; site.addsitedir('$$($(BIN)/python $(PURELIB))')" \
		> "$$($(OLDER)/bin/python $(PURELIB))/newer.pth"
	touch $@
