"""pyproject.toml, requirements.lock and environment.yml say the same; none of them names a place to install from."""

import re
import tomllib

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from kvlib.paths import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
DECLARED = [
    Requirement(line)
    for lines in (PROJECT["dependencies"], *PROJECT["optional-dependencies"].values())
    for line in lines
]
LOCK = [Requirement(line) for line in (ROOT / "requirements.lock").read_text().splitlines() if not line.startswith("#")]
PYTHONS = ("3.11", "3.12")


def locked(name: str, python: str) -> list[str]:
    """The versions that the lock allows for one package on Linux."""
    machine = {"python_version": python, "python_full_version": f"{python}.0", "sys_platform": "linux"}
    pins = [pin for pin in LOCK if pin.name == name and (pin.marker is None or pin.marker.evaluate(machine))]
    return [str(pin.specifier).removeprefix("==") for pin in pins]


@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize("requirement", DECLARED, ids=str)
def test_lock_pins_each_dependency_within_its_range(requirement, python):
    versions = locked(requirement.name, python)
    assert len(versions) == 1
    assert requirement.specifier.contains(versions[0])


def test_lock_holds_exact_versions_only():
    assert all(re.fullmatch(r"==[\w.]+", str(pin.specifier)) and pin.url is None for pin in LOCK)


def test_conda_wrapper_installs_the_same():
    conda = yaml.safe_load((ROOT / "environment.yml").read_text())
    *packages, pip = conda["dependencies"]
    assert packages == ["python=3.11", "pip"]
    assert pip == {"pip": ["-c requirements.lock", "-e .[dev]"]}
    assert set(PYTHONS) == {
        f"3.{minor}" for minor in range(30) if f"3.{minor}" in SpecifierSet(PROJECT["requires-python"])
    }


@pytest.mark.parametrize("name", ["pyproject.toml", "requirements.lock", "environment.yml", "Makefile", ".ci/run"])
def test_nothing_says_where_to_install_from(name):
    """Where packages come from is the user's configuration."""
    text = (ROOT / name).read_text()
    assert not re.search(r"://|--hash|\bindex[-_]url|find[-_]links|trusted[-_]host", text)
