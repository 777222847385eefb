"""The wheel: another distribution's name than the import package's, and all that the command needs."""

import os
import subprocess
import sys
from email import message_from_bytes
from pathlib import Path
from zipfile import ZipFile

import pytest

import limiter
from tests.support.paths import ROOT


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(folder)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (path,) = folder.iterdir()
    return path


def test_wheel_is_of_credit_limiter_and_holds_the_package_limiter(wheel: Path) -> None:
    about = f"credit_limiter-{limiter.__version__}.dist-info"
    with ZipFile(wheel) as archive:
        metadata = message_from_bytes(archive.read(f"{about}/METADATA"))
        names = archive.namelist()
    assert (metadata["Name"], metadata["Version"]) == ("credit-limiter", limiter.__version__)
    assert {name.partition("/")[0] for name in names} == {"limiter", about}
    assert f"{about}/licenses/LICENSE" in names


def test_wheel_holds_every_module_and_every_script(wheel: Path) -> None:
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "limiter").rglob("*.py")}
    scripts = {f"limiter/{path.relative_to(ROOT)}" for path in (ROOT / "lua").rglob("*.lua")}
    with ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert scripts
    assert modules | scripts | {"limiter/py.typed"} <= names


def test_command_when_installed_from_the_wheel_then_it_runs_with_the_scripts_inside(
    wheel: Path, tmp_path: Path
) -> None:
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-index", "--no-deps"]
    subprocess.run([*pip, "--target", str(tmp_path / "site"), str(wheel)], check=True)

    def installed(*words: str) -> str:
        environment = os.environ | {"PYTHONPATH": str(tmp_path / "site")}
        return subprocess.run(words, cwd=tmp_path, env=environment, check=True, capture_output=True, text=True).stdout

    command = str(tmp_path / "site/bin/limiter")
    assert installed(command, "--version").strip() == limiter.__version__
    assert 'redis.call("HSET"' in installed(command, "lua", "show", "reserve")
    where = installed(sys.executable, "-c", "import limiter; print(limiter.__file__)")
    assert Path(where.strip()) == tmp_path / "site/limiter/__init__.py"
