# make tutorial   the whole course, from a bare Python 3.11+
# make test       the same environment, and every test, the notebooks among them
# make quick      the same environment, and the tests that need no network, browser or GPU, in three minutes
# make lab        JupyterLab on the notebooks
#
# TORCH_INDEX=https://download.pytorch.org/whl/cpu  takes torch from PyTorch's own CPU index.
# Where the image brings a torch that sees a GPU, that one is kept.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: tutorial test quick lab kernel notebooks clean

tutorial: kernel
	$(BIN)/chatmagic tutorial

test: $(READY)
	$(BIN)/python -m pytest --nbval-lax --nbval-current-env --nbval-cell-timeout=3600 notebooks tests

quick: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow and not network and not browser and not gpu" tests

lab: kernel
	$(BIN)/jupyter lab $(if $(filter 0,$(shell id -u)),--allow-root) notebooks

kernel: $(READY)
	$(BIN)/python -m ipykernel install --user --name chatmagic --display-name chatmagic --env OMP_WAIT_POLICY PASSIVE

notebooks: $(READY)
	$(BIN)/chatmagic tutorial --in-place

$(READY): pyproject.toml constraints.txt
	if $(PYTHON) -c "import torch; assert torch.cuda.is_available()" 2>/dev/null; \
	then $(PYTHON) -m venv --clear --system-site-packages $(VENV); grep -v "^torch==" constraints.txt > $(VENV)/constraints.txt; \
	else $(PYTHON) -m venv --clear $(VENV); cp constraints.txt $(VENV); fi
	$(BIN)/pip install --quiet $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) -c $(VENV)/constraints.txt -e ".[lab,test]"
	touch $@

clean:
	rm -rf $(VENV) work
