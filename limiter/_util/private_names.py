"""The check that a library still has the private names which a module of ours uses."""

from collections.abc import Iterable, Mapping
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pkgutil import resolve_name


def require(requirement: str, needs: Mapping[str, Iterable[str]]) -> None:
    """Raise ImportError unless a library has the names that a module needs.

    Call it where the module is imported: a name that is gone is then found at the start, and not in the one request in
    a million that needs it, nor never, when it is a method that the library no longer calls.

    Args:
        requirement: the versions that have the names, as pip takes them: "redis>=8.1,<8.2".
        needs: names by the class or module that has them: {"aiohttp.web.Server": ("_kwargs",)}.
    """
    missing = [f"{owner}.{name}" for owner, names in needs.items() for name in names if not _has(owner, name)]
    if missing:
        raise unsupported(requirement, f"has no {', '.join(missing)}")


def unsupported(requirement: str, reason: str) -> ImportError:
    """Return the error for a library whose private parts are not as we use them. reason: as "has no Server._loop"."""
    library = requirement.partition(">")[0]
    with suppress(PackageNotFoundError):
        library = f"{library} {version(library)}"
    return ImportError(f"{library} {reason}, which limiter needs: install one that has it, pip install '{requirement}'")


def _has(owner: str, name: str) -> bool:
    try:
        found = resolve_name(owner)
    except (ImportError, AttributeError):
        return False
    # What a constructor sets is on instances only, but its code names it.
    made_by = getattr(getattr(found, "__init__", None), "__code__", None)
    return hasattr(found, name) or (made_by is not None and name in made_by.co_names)
