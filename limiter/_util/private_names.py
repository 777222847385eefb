"""The check that a library still has the private names that a module uses."""

from collections.abc import Iterable, Mapping
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pkgutil import resolve_name


def require(requirement: str, needs: Mapping[str, Iterable[str]]) -> None:
    """Raise ImportError unless a library has the names that a module needs.

    Call it when the module is imported, so that a missing name is found at the start, and not by a rare request, or
    never, as with a method that the library no longer calls.

    Args:
        requirement: the versions that have the names, in pip's syntax: "redis>=8.1,<8.2".
        needs: names by class or module: {"aiohttp.web.Server": ("_kwargs",)}.
    """
    missing = [f"{owner}.{name}" for owner, names in needs.items() for name in names if not _has(owner, name)]
    if missing:
        raise unsupported(requirement, f"has no {', '.join(missing)}")


def unsupported(requirement: str, reason: str) -> ImportError:
    """Return the error for a library that lacks a private name. reason: such as "has no Server._loop"."""
    library = requirement.partition(">")[0]
    with suppress(PackageNotFoundError):
        library = f"{library} {version(library)}"
    return ImportError(f"{library} {reason}, which limiter needs: install one that has it, pip install '{requirement}'")


def _has(owner: str, name: str) -> bool:
    try:
        found = resolve_name(owner)
    except (ImportError, AttributeError):
        return False
    # An attribute that the constructor sets is on instances only, but its code names it.
    constructor = getattr(getattr(found, "__init__", None), "__code__", None)
    return hasattr(found, name) or (constructor is not None and name in constructor.co_names)
