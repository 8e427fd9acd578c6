"""The API page documents everything that is public."""

import importlib
import inspect
import pkgutil
import re

import pytest

import qlora_lib
from chapters import ROOT

PAGE = (ROOT / "book" / "api.md").read_text()
DOCUMENTED = set(re.findall(r"^\.\. (?:auto\w+|py:data):: (\S+)", PAGE, re.M))
WITH_MEMBERS = set(re.findall(r"^\.\. automodule:: (\S+)\n   :members:", PAGE, re.M))

MODULES = [
    importlib.import_module(info.name)
    for info in pkgutil.walk_packages(qlora_lib.__path__, "qlora_lib.")
]
EXPORTING = [qlora_lib, *(module for module in MODULES if hasattr(module, "__all__"))]


@pytest.mark.parametrize("module", EXPORTING, ids=lambda module: module.__name__)
def test_every_exported_name_is_on_the_page(module):
    if module.__name__ in WITH_MEMBERS:
        return
    missing = [
        name
        for name in module.__all__
        if not {f"{module.__name__}.{name}", f"qlora_lib.{name}"} & DOCUMENTED
    ]
    assert not missing, f"document {missing} in book/api.md"


def test_every_module_of_a_package_without_exports_is_on_the_page():
    """Modules that are imported by their own name, such as qlora_lib.plotting."""
    packages = {module.__name__ for module in EXPORTING} - {"qlora_lib"}
    for module in MODULES:
        exported_by_package = module.__name__.rpartition(".")[0] in packages
        public = [
            name
            for name, value in inspect.getmembers(module, callable)
            if value.__module__ == module.__name__ and not name.startswith("_")
        ]
        if public and not exported_by_package:
            assert module.__name__ in WITH_MEMBERS, f"document {module.__name__}"


def test_the_page_documents_nothing_that_is_gone():
    for name in DOCUMENTED:
        owner, _, attribute = name.rpartition(".")
        if name not in {module.__name__ for module in [qlora_lib, *MODULES]}:
            assert hasattr(importlib.import_module(owner), attribute), name
