"""What import-linter cannot say: each package imports what its docstring names, and one module spells keys."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.paths import ROOT

PACKAGE = ROOT / "limiter"
MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
    if path != PACKAGE / "__init__.py"
}
PACKAGES = sorted(
    name for name, path in MODULES.items() if path.name == "__init__.py" and name not in {"relay", "cli"}
)  # the first of these two has packages of its own, the second may import everything
# Modules that hold more than their names say would be two things.
MAX_TOP_MODULES = 8


def docstring_of(package: str) -> str:
    return ast.get_docstring(ast.parse(MODULES[package].read_text())) or ""


def imports_of(module: str) -> Iterator[str]:
    """The modules of our own package that a module imports, wherever in it."""
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} has a relative import"
            inner = (node.module or "").removeprefix("limiter.")
            below = [f"{node.module}.{alias.name}" for alias in node.names]
            # A name of a package stands for the module that it is, or else for the package.
            names = [each if each.removeprefix("limiter.") in MODULES else f"limiter.{inner}" for each in below]
        for name in names:
            if (inner := name.removeprefix("limiter.")) in MODULES and name != inner:
                yield inner


@pytest.mark.parametrize("package", PACKAGES)
def test_package_when_it_imports_then_exactly_what_its_docstring_names(package: str) -> None:
    listed = re.search(r"May import: ([^.]*(?:\.[a-z_]+[^.]*)*)\.$", docstring_of(package), re.MULTILINE)
    assert listed, f"{package} does not say what it may import"
    allowed = set() if listed[1] == "nothing of limiter" else set(listed[1].replace("\n", " ").split(", "))
    used = set()
    for module in MODULES:
        if module.startswith(f"{package}."):
            for imported in imports_of(module):
                if not imported.startswith(f"{package}."):
                    named = {each for each in allowed if imported == each or imported.startswith(f"{each}.")}
                    assert named, f"{module} imports {imported}, which {package} does not name"
                    used |= named
    assert used == allowed, f"{package} names what it does not import"


@pytest.mark.parametrize("package", PACKAGES)
def test_package_when_it_is_imported_then_it_names_nothing_a_second_time(package: str) -> None:
    """Each name has one door, the module that defines it. The docstring says where to begin reading."""
    tree = ast.parse(MODULES[package].read_text())
    assert len(tree.body) == 1, f"{package} has code beside its docstring"
    named = re.findall(r"`([a-z_]+)\.(\w+)`", docstring_of(package))
    assert named, f"{package} names nothing public"
    for module, name in named:
        source = MODULES[f"{package}.{module}"].read_text()
        assert re.search(rf"^(?:async def|def|class) {name}\b|^{name}\b", source, re.MULTILINE), f"{module}.{name}"


def test_modules_when_they_are_counted_then_few_lie_at_the_top() -> None:
    assert len(list(PACKAGE.glob("*.py"))) <= MAX_TOP_MODULES
    assert len(list((PACKAGE / "relay").glob("*.py"))) <= MAX_TOP_MODULES


def test_keys_when_spelled_then_in_one_module() -> None:
    for module, path in MODULES.items():
        if module != "credits.keys":
            spelled = [
                node.value
                for node in ast.walk(ast.parse(Path(path).read_text()))
                if isinstance(node, ast.Constant)
                and isinstance(node.value, str)
                and re.search(":(install|claim|retry|seats|mint):", node.value)
            ]
            assert not spelled, f"{module} spells a key"
