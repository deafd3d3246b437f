# make tutorial   the whole course, from a bare Python 3.11+
# make test       the same environment, and every test, the notebooks among them
# make series     the English notebooks by Run All in JupyterLab, with the smaller model, and looked at
# make quick      the same environment, and the tests that need no network, browser or GPU, in three minutes
# make lab        JupyterLab on the repository, at the first notebook
# make docs       the book: pages, executed notebooks and API as a site in work/book, with no network
#
# LANGUAGE=en  takes the notebooks in English, for tutorial, lab and notebooks; the environment, where gettext has a
# variable of that name, is not asked.
# TORCH_INDEX=https://download.pytorch.org/whl/cpu  takes torch from PyTorch's own CPU index.
# PYTHON=python3.12  is the Python that the environment is made of.
# Where the image brings a torch that sees a GPU, that one is kept. What was broken off is begun again by the same command.

LANGUAGE := zh
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
WORKERS := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -p no:nbval -n 2 --dist loadfile
FITS := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))
AS_TYPED := $(strip $(filter-out PYTHON=%,$(MAKEOVERRIDES)) $(MAKECMDGOALS))

.PHONY: tutorial test series quick lab kernel notebooks docs clean

tutorial: kernel
	$(BIN)/python -m chatmagic.cli tutorial --language $(LANGUAGE)

test: $(READY)
	$(BIN)/python -m pytest --nbval-lax --nbval-current-env --nbval-cell-timeout=3600 notebooks/*.ipynb
	$(WORKERS) --ignore=tests/notebook/test_series.py tests

series: $(READY)
	$(BIN)/python -m pytest tests/notebook/test_series.py

quick: $(READY)
	$(WORKERS) -m "not slow and not network and not browser and not gpu" tests

lab: kernel
	$(BIN)/python -m jupyterlab $(if $(filter 0,$(shell id -u)),--allow-root) --LabApp.default_url=/lab/tree/notebooks/$(addsuffix /,$(filter-out zh,$(LANGUAGE)))00-setup.ipynb

kernel: $(READY)
	$(BIN)/python -m ipykernel install --user --name chatmagic --display-name chatmagic --env OMP_WAIT_POLICY PASSIVE

notebooks: $(READY)
	$(BIN)/python -m chatmagic.cli tutorial --language $(LANGUAGE) --in-place

docs: $(READY)
	$(BIN)/python -m sphinx --fail-on-warning --keep-going -q -c docs/book . work/book
	@echo "The book is work/book/index.html"

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c "$(FITS)" 2>/dev/null || { \
	echo "$(PYTHON) is $$($(PYTHON) --version 2>&1 | head -n 1); chatmagic runs on Python 3.11, 3.12 and 3.13."; \
	for other in python3.12 python3.13 python3.11; do \
	if $$other -c "$(FITS)" 2>/dev/null; then echo "Type: make PYTHON=$$other $(AS_TYPED)"; exit 1; fi; done; \
	echo "None of them is here. As root: apt install python3.12 python3.12-venv (or what your system calls it), then"; \
	echo "make PYTHON=python3.12 $(AS_TYPED). Without root: conda env create -f environment.yml"; exit 1; }
	set -e; if $(PYTHON) -c "import torch; assert torch.cuda.is_available()" 2>/dev/null; \
	then $(PYTHON) -m venv --clear --system-site-packages $(VENV); grep -v "^torch==" constraints.txt > $(VENV)/constraints.txt; \
	else $(PYTHON) -m venv --clear $(VENV); cp constraints.txt $(VENV); fi
	$(BIN)/python -m pip install --quiet $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) -c $(VENV)/constraints.txt -e ".[lab,docs,test]"
	touch $@

clean:
	rm -rf $(VENV) work
