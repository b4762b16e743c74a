# `make demo` and `make test` do all their own set-up; a second call starts at once.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TORCH := $(shell grep '^torch==' constraints.txt)
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check
# MONAI Label needs numpy below 2: an environment of its own, made anew when its versions change
LABEL_HASH := $(shell sha256sum < monailabel_app/constraints.txt | cut -c1-12)
LABEL_VENV := .venv-label/$(LABEL_HASH)
LABEL_BIN := $(LABEL_VENV)/bin
LABEL_INSTALL := $(LABEL_BIN)/python -m pip install --quiet --disable-pip-version-check
SOURCES_OF_INSTALL := setup.cfg pyproject.toml constraints.txt

# for `make train`: a folder of label maps in, weights out; of LEFT_OUT the left hippocampus is labelled as cortex and fluid
MAPS ?= maps
PREPARED ?= prepared
VALIDATION ?= training_seg_18,training_seg_19
LEFT_OUT ?= training_seg_07
JOBS ?= 2

# for `make label-server`: a folder of scans, or the address of a DICOMweb archive
STUDIES ?= studies
PORT ?= 8000
STRUCTURES ?= head

.PHONY: help demo test test-label label-server format train gpu-kit bundle test-artifact wheel clean

help:
	@echo "make demo    segment two example scans and show where their report pages lie"
	@echo "make test    formatting, lint, types and tests"
	@echo "make label-server STUDIES=folder  MONAI Label on this machine, for 3D Slicer and OHIF"
	@echo "make test-label  tests with MONAI Label servers, in their own environment"
	@echo "make test-artifact  the zip, the wheel and the sdist, each in an environment of its own"
	@echo "make format  let ruff rewrite what it can"
	@echo "make train   MAPS=folder of SynthSeg label maps: prepare the subjects, list them, train"
	@echo "make gpu-kit DATALIST=prepared/datalist.json  a folder for some minutes on a bare GPU machine, in dist/"
	@echo "make bundle  the zip for a model zoo, with the package inside, in dist/"
	@echo "make wheel   wheel and sdist, in dist/"
	@echo "make clean   remove the environment and the demo's files"

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# torch comes first, so that a build that is there already (CPU or CUDA) is kept by what follows
$(VENV)/.torch: constraints.txt | $(BIN)/python
	$(INSTALL) "$(TORCH)"
	@touch $@

$(VENV)/.demo: $(SOURCES_OF_INSTALL) $(VENV)/.torch
	$(INSTALL) -c constraints.txt -e ".[report]"
	@touch $@

$(VENV)/.all: $(SOURCES_OF_INSTALL) $(VENV)/.torch
	$(INSTALL) -c constraints.txt -e ".[all]"
	@touch $@

demo: $(VENV)/.demo
	$(BIN)/brainfm-monai demo-scans demo/scans
	$(BIN)/python -m monai.bundle run --config_file bundle/configs/inference.json --bundle_root bundle \
		--input demo/scans --output_dir demo/output
	@echo && echo "The report pages:" && find "$(CURDIR)/demo/output" -name '*_report.html' | sort

test: $(VENV)/.all
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/pytest -n 2

# torchvision's build may not fit that of torch; MONAI Label imports two of its functions and this app uses neither
$(LABEL_VENV)/.done: setup.cfg
	$(PYTHON) -m venv $(LABEL_VENV)
	@find .venv-label -mindepth 1 -maxdepth 1 ! -name $(LABEL_HASH) -exec rm -rf {} +
	$(LABEL_INSTALL) "$(shell grep '^torch==' monailabel_app/constraints.txt)"
	$(LABEL_INSTALL) -c monailabel_app/constraints.txt -e ".[label,prepare,report,train]" pytest
	$(LABEL_BIN)/python -c "import torchvision.utils" 2>/dev/null || ( \
		$(LABEL_BIN)/python -m pip uninstall --quiet --yes torchvision && \
		echo "$(CURDIR)/monailabel_app/stand_in" > "$$($(LABEL_BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/torchvision_stand_in.pth" )
	@touch $@

label-server: $(LABEL_VENV)/.done
	$(LABEL_BIN)/python monailabel_app/start.py "$(STUDIES)" --port $(PORT) --structures $(STRUCTURES)

test-label: $(LABEL_VENV)/.done
	$(LABEL_BIN)/python -m pytest -m label tests/label

format: $(VENV)/.all
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

train: $(VENV)/.all
	$(BIN)/brainfm-monai prepare labels "$(MAPS)" "$(PREPARED)" --jobs $(JOBS) --contrasts T1w,T2w,FLAIR,CT
	$(BIN)/brainfm-monai data list "$(PREPARED)" --validation "$(VALIDATION)" --test "$(LEFT_OUT)"
	$(BIN)/brainfm-monai train "$(PREPARED)/datalist.json" --variant coarse,muon
	$(BIN)/brainfm-monai train "$(PREPARED)/datalist.json" --variant release,muon --weights bundle/training_coarse/model.pt

# what a bare GPU machine without a network needs to test, measure and train: run.sh MINUTES OUT
DATALIST ?= $(PREPARED)/datalist.json
gpu-kit: $(VENV)/.all
	$(BIN)/python packaging/make_gpu_kit.py "$(DATALIST)" --output dist/gpu-kit

# the zip that a model zoo distributes, in dist/; the same files give the same bytes
bundle:
	$(PYTHON) packaging/make_bundle.py --output dist

# what the zip needs, by its own metadata.json, and nothing of ours; torch comes from the file of `make test`
ARTIFACT := .venv-artifact
$(ARTIFACT)/.done: bundle/configs/metadata.json constraints.txt
	$(PYTHON) -m venv --clear $(ARTIFACT)
	$(ARTIFACT)/bin/python -m pip install --quiet --disable-pip-version-check "$(TORCH)"
	$(PYTHON) packaging/make_bundle.py --requirements | xargs $(ARTIFACT)/bin/python -m pip install --quiet --disable-pip-version-check
	@touch $@

# what the wheel requires, and nothing of ours
WHEEL := .venv-wheel
$(WHEEL)/.done: setup.cfg constraints.txt
	$(PYTHON) -m venv --clear $(WHEEL)
	$(WHEEL)/bin/python -m pip install --quiet --disable-pip-version-check "$(TORCH)"
	$(WHEEL)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt .
	$(WHEEL)/bin/python -m pip uninstall --quiet --yes brainfm-monai
	@touch $@

test-artifact: $(VENV)/.all $(ARTIFACT)/.done $(WHEEL)/.done
	ARTIFACT_PYTHON=$(ARTIFACT)/bin/python WHEEL_PYTHON=$(WHEEL)/bin/python $(BIN)/pytest -m artifact tests/test_artifact.py tests/test_distribution.py

# wheel and sdist, in dist/; the wheel carries the bundle
wheel: $(VENV)/.all
	$(BIN)/python -m build --no-isolation --outdir dist .

clean:
	rm -rf $(VENV) .venv-label $(ARTIFACT) $(WHEEL) demo
