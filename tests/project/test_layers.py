"""Imports go one way: whoever serves uses the facade, the facade uses scripts and store, and these the values."""

import ast
import re
from collections.abc import Iterator

import pytest

from tests.support.paths import ROOT

PACKAGE = ROOT / "limiter"
MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
    if path != PACKAGE / "__init__.py"
}
# Whoever is not listed serves: relay, admin, cli, persister and what belongs to them. They import what they like of
# these, and none of these imports one of them.
LAYERS = (
    (
        "_util.cancellation",
        "errors",
        "_util.timestamps",
        "redis.lua_source",
        "_util.fingerprint_set",
        "redis.multiplexed",
    ),
    ("redis.client", "redis.url"),
    ("redis.fan_out",),
    ("redis.slot_map",),
    ("redis.cluster",),
    ("redis.scan",),
    ("credits.keys", "credits.models"),
    ("credits.scripts",),
    ("credits.rows",),
    ("credits.denial_cache", "credits.hold"),
    ("credits.limiter",),
)
# Beside the layers: the way to a server, which knows errors only.
DOOR = (
    "redis.embedded",
    "redis.multiplexed",
    "redis.client",
    "redis.url",
    "redis.fan_out",
    "redis.slot_map",
    "redis.cluster",
    "redis.sentinel",
    "redis.connect",
)


def imports_of(module: str) -> Iterator[str]:
    """Give the modules of our own package that a module imports, wherever in it."""
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} has a relative import"
            names = [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
        for name in names:
            if (inner := name.removeprefix("limiter.")) in MODULES and name != inner:
                yield inner


@pytest.mark.parametrize(("depth", "layer"), list(enumerate(LAYERS)))
def test_layer_when_it_imports_then_only_from_the_layers_below_it_or_its_own(
    depth: int, layer: tuple[str, ...]
) -> None:
    allowed = {name for below in LAYERS[: depth + 1] for name in below}
    for module in layer:
        assert set(imports_of(module)) <= allowed - {module}, f"{module} imports upwards"


@pytest.mark.parametrize("module", DOOR)
def test_door_when_it_imports_then_it_knows_no_rows(module: str) -> None:
    assert set(imports_of(module)) <= {"errors", *DOOR} - {module}


@pytest.mark.parametrize("module", ["config.settings", "config.loader"])
def test_settings_when_they_import_then_they_start_nothing(module: str) -> None:
    assert not {name for name in imports_of(module) if name.partition(".")[0] in {"relay", "cli"}}


def test_settings_when_they_import_then_they_do_not_know_where_values_come_from() -> None:
    assert set(imports_of("config.settings")) == {"credits.models"}


def test_relay_when_it_imports_then_it_does_not_know_the_commands() -> None:
    for module in MODULES:
        if module.partition(".")[0] != "cli":
            assert not [name for name in imports_of(module) if name.partition(".")[0] == "cli"], module


def test_keys_when_spelled_then_in_one_module() -> None:
    for module, path in MODULES.items():
        if module != "credits.keys":
            spelled = [
                node.value
                for node in ast.walk(ast.parse(path.read_text()))
                if isinstance(node, ast.Constant)
                and isinstance(node.value, str)
                and re.search(":(install|claim|retry|seats|mint):", node.value)
            ]
            assert not spelled, f"{module} spells a key"
