# Two commands matter: `make book` builds the book, `make test` tests everything.
# PYTHON picks the interpreter that makes the virtual environment.
PYTHON ?= python3
VENV ?= .venv

BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed
HTML := _build/html/index.html

.PHONY: help book test chapters clean

help:
	@echo "make book      make .venv, install, build the book into _build/html"
	@echo "make test      make .venv, install, run every check and every chapter"
	@echo "make chapters  run every chapter and write its outputs in place"
	@echo "make clean     remove .venv and _build"
	@echo "PYTHON=python3.12 picks another Python, for example: make book PYTHON=python3.12"

# --all: an incremental build would not repeat the warnings of pages it skips.
book: $(INSTALLED)
	$(BIN)/jupyter-book build . -W --keep-going -n --all
	@echo "Open the book: $(CURDIR)/$(HTML)"

test: $(INSTALLED)
	$(BIN)/python tests/run.py

chapters: $(INSTALLED)
	$(BIN)/python book/chapters.py execute

clean:
	rm -rf $(VENV) _build

$(INSTALLED): $(BIN)/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install -c constraints.txt -e '.[book,test]'
	@touch $@

$(BIN)/python:
	@$(PYTHON) -c 'import sys, ensurepip; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || \
	  { echo "$(PYTHON) is no Python 3.11, 3.12 or 3.13 with venv." \
	    "Install one (on Debian: apt install python3 python3-venv) and name it:" \
	    "make $(MAKECMDGOALS) PYTHON=/path/to/python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
