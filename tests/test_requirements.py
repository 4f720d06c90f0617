"""What pip may install with the package: no release that was withdrawn since it was malicious."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# GHSA-w37p-236h-pfx3: of both names under which Lightning is published.
WITHDRAWN = ("2.6.2", "2.6.3")


def requirements(name):
    """All that pyproject.toml and constraints.txt say of the package `name`, in any group."""
    lines = [*PROJECT["dependencies"], *(line for group in PROJECT["optional-dependencies"].values() for line in group)]
    constraints = (ROOT / "constraints.txt").read_text().splitlines()
    lines += [line for line in constraints if line and not line.startswith("#")]
    return [one for one in map(Requirement, lines) if canonicalize_name(one.name) == name]


@pytest.mark.parametrize("name", ["lightning", "pytorch-lightning"])
def test_malicious_releases_are_not_accepted(name):
    found = requirements(name)
    assert len(found) == 2
    for requirement in found:
        # Asked for by a user in the same command, they are to be refused as well.
        assert not any(requirement.specifier.contains(version, prereleases=True) for version in WITHDRAWN)


@pytest.mark.parametrize("name", ["lightning", "pytorch-lightning"])
def test_the_releases_beside_them_are(name):
    accepted = requirements(name)[0].specifier
    assert all(accepted.contains(version) for version in ("2.6.0", "2.6.1", "2.6.4", "2.6.5", "2.6.6"))
