"""environment.yml, constraints.txt and pyproject.toml tell one story."""

import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

import qlora_lib

ROOT = Path(__file__).parent.parent

CONDA_NAMES = {"torch": "pytorch", "matplotlib": "matplotlib-base"}
# The package itself, and what makes an environment without being a dependency.
CONDA_ONLY = {"python", "pip"}


def read_project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def read_requirements() -> dict[str, Requirement]:
    """What the project and its extras ask for, less the project's own extras."""
    project = read_project()
    lines = [project["dependencies"], *project["optional-dependencies"].values()]
    requirements = [Requirement(line) for group in lines for line in group]
    return {r.name: r for r in requirements if r.name != project["name"]}


def read_environment() -> tuple[dict[str, Requirement], dict[str, Requirement]]:
    """The requirements of environment.yml: conda's, and pip's."""
    entries = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    conda = [Requirement(entry) for entry in entries if isinstance(entry, str)]
    (pip_lines,) = (entry["pip"] for entry in entries if isinstance(entry, dict))
    pip = [Requirement(line) for line in pip_lines if not line.startswith("--")]
    assert "--editable ." in pip_lines
    return {r.name: r for r in conda}, {r.name: r for r in pip}


def read_constraints() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [line.split("==") for line in lines if not line.startswith("#")]
    return {canonicalize_name(name): version for name, version in pins}


REQUIREMENTS = read_requirements()


@pytest.mark.parametrize("name", sorted(REQUIREMENTS))
def test_environment_states_the_range_of_pyproject(name):
    conda, pip = read_environment()
    stated = conda.get(CONDA_NAMES.get(name, name)) or pip.get(name)
    assert stated is not None, f"add {REQUIREMENTS[name]} to environment.yml"
    assert stated.specifier == REQUIREMENTS[name].specifier
    assert stated.marker == REQUIREMENTS[name].marker


def test_environment_asks_for_nothing_else():
    conda, pip = read_environment()
    known = {CONDA_NAMES.get(name, name) for name in REQUIREMENTS} | CONDA_ONLY
    assert {*conda, *pip} <= known
    assert not {*conda} & {*pip}


def test_environment_states_the_python_of_pyproject():
    conda, _ = read_environment()
    assert conda["python"].specifier == SpecifierSet(read_project()["requires-python"])


def test_triton_is_asked_for_only_where_it_exists():
    marker = REQUIREMENTS["triton"].marker
    assert marker is not None
    assert marker.evaluate({"platform_system": "Linux"})
    assert not marker.evaluate({"platform_system": "Darwin"})
    assert not marker.evaluate({"platform_system": "Windows"})


@pytest.mark.parametrize("name", sorted(set(REQUIREMENTS) - {"triton"}))
def test_constraints_lie_in_the_range(name):
    pins = read_constraints()
    assert canonicalize_name(name) in pins, f"pin {name} in constraints.txt"
    assert REQUIREMENTS[name].specifier.contains(pins[canonicalize_name(name)])


def test_constraints_leave_out_the_build_of_a_platform():
    assert not [pin for pin in read_constraints().values() if "+" in pin]


def test_constraints_leave_the_installer_alone():
    assert not {"pip", "setuptools", "wheel"} & set(read_constraints())


def test_citation_names_the_version_of_the_package():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == qlora_lib.__version__
