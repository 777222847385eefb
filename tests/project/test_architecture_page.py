"""docs/explanation/architecture.md names the steps of a request and the packages as they are."""

import re
import tomllib
from pathlib import Path

import pytest

from limiter.relay.handlers import metered
from tests.support.paths import ROOT

PAGE = (ROOT / "docs/explanation/architecture.md").read_text(encoding="utf-8")
CONTRACTS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]


def packages_of(folder: Path) -> set[str]:
    return {path.parent.name for path in folder.glob("*/__init__.py")}


def layer_of(container: str, package: str) -> int:
    layers = next(each["layers"] for each in CONTRACTS if each.get("containers") == [container])
    return next(at for at, names in enumerate(layers) if package in names.split(" : "))


def test_steps_when_read_then_they_are_those_of_the_module_in_its_order() -> None:
    steps = re.findall(r"^\d\. \*\*(\w+)\.\*\*", PAGE, flags=re.MULTILINE)
    assert metered.__doc__ is not None
    assert ", ".join(steps).lower() in metered.__doc__


@pytest.mark.parametrize("container", ["limiter", "limiter.relay"])
def test_packages_when_listed_then_each_is_there_and_none_stands_above_one_that_may_import_it(container: str) -> None:
    folder = container.replace(".", "/")
    pattern = r"^\| `limiter/(\w+)(?:\.py)?` \|" if container == "limiter" else r"^\| `(\w+)(?:\.py)?` \|"
    listed = re.findall(pattern, PAGE, flags=re.MULTILINE)
    assert packages_of(ROOT / folder) <= set(listed)
    assert all((ROOT / folder / name).is_dir() or (ROOT / folder / f"{name}.py").is_file() for name in listed)
    places = [layer_of(container, name) for name in listed]
    assert places == sorted(places)
