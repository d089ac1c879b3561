"""What the project depends on: ranges in pyproject.toml, exact versions in requirements.lock."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from support import ROOT

PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
MAKEFILE = (ROOT / "Makefile").read_text("utf-8")
LOCK = (ROOT / "requirements.lock").read_text("utf-8").splitlines()
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
PYTHONS = ("3.11", "3.12", "3.13", "3.14")
SYSTEMS = ("linux", "darwin", "win32")


def direct(extra: str | None = None) -> Iterator[Requirement]:
    """What we ask for ourselves, with the extras that an extra names."""
    asked = PROJECT["dependencies"] if extra is None else PROJECT["optional-dependencies"][extra]
    for requirement in map(Requirement, asked):
        if requirement.name == PROJECT["name"]:
            for each in sorted(requirement.extras):
                yield from direct(each)
        else:
            yield requirement


def locked(python: str, system: str) -> dict[str, Version]:
    """Versions by name on such a machine."""
    values = {"python_version": python, "python_full_version": f"{python}.0"}
    where = values | {"sys_platform": system, "platform_machine": "x86_64"}
    found: dict[str, Version] = {}
    for requirement in map(Requirement, LOCK):
        if requirement.marker is None or requirement.marker.evaluate(where):
            (version,) = requirement.specifier
            assert canonicalize_name(requirement.name) not in found, requirement.name
            found[canonicalize_name(requirement.name)] = Version(version.version)
    return found


def test_the_lock_holds_names_and_versions_alone() -> None:
    strange = [line for line in LOCK if not re.fullmatch(r"[a-z0-9-]+==[\w.]+( ; [^#@/]+)?", line)]
    assert not strange


@pytest.mark.parametrize("system", SYSTEMS)
@pytest.mark.parametrize("python", PYTHONS)
def test_the_lock_is_within_our_ranges(python: str, system: str) -> None:
    versions = locked(python, system)
    outside = [
        f"{requirement}: {versions.get(canonicalize_name(requirement.name))}"
        for requirement in (*direct(), *direct("dev"))
        if versions.get(canonicalize_name(requirement.name)) not in requirement.specifier
    ]
    assert not outside, "make lock renews requirements.lock"


def test_torch_is_one_version_everywhere_and_brings_no_cuda() -> None:
    (made,) = re.findall(r"^TORCH +\?= torch==([\d.]+)$", MAKEFILE, re.MULTILINE)
    assert locked("3.11", "linux")["torch"] == Version(made)
    lowest = {each for each in direct("dev") if each.name == "torch"}
    assert all(f">={made.rpartition('.')[0]}" in str(each.specifier) for each in lowest)
    assert not [line for line in LOCK if re.match(r"nvidia|cuda|triton", line)]


def targets() -> set[str]:
    (names,) = re.findall(r"^\.PHONY: (.+)$", MAKEFILE, re.MULTILINE)
    return set(names.split())


def test_help_knows_every_target_of_the_makefile() -> None:
    assert set(re.findall(r"^([\w-]+):.*  ## ", MAKEFILE, re.MULTILINE)) == targets()


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_a_workflow_runs_what_the_makefile_has(path: Path) -> None:
    jobs = yaml.safe_load(path.read_text("utf-8"))["jobs"]
    ran: set[str] = set()
    for job in jobs.values():
        rows = job["strategy"]["matrix"]["include"]
        for step in job["steps"]:
            for target in re.findall(r"^make (\$\{\{.+?\}\}|\S+)", step.get("run", "")):
                name = re.fullmatch(r"\$\{\{ matrix\.(\w+) \}\}", target)
                ran |= {target} if name is None else {row[name[1]] for row in rows}
    assert ran <= targets()
    assert {"test", "test-newest", "test-oldest"} <= ran


def test_the_public_workflow_covers_three_systems() -> None:
    (path,) = WORKFLOWS
    workflow = yaml.safe_load(path.read_text("utf-8"))
    rows = workflow["jobs"]["locked"]["strategy"]["matrix"]["include"]
    systems = {row["system"].partition("-")[0] for row in rows}
    assert systems == {"ubuntu", "macos", "windows"}
    assert workflow[True]["schedule"]  # YAML reads the key "on" as true
