"""Loads the settings from a TOML file, the environment and the command line, each of which overrides those before it.

Unknown keys are errors that name the nearest known one. Secrets are printed as `***`.
"""

import difflib
import json
import os
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_origin

from pydantic import BaseModel, SecretStr, ValidationError
from pydantic_settings import EnvSettingsSource
from pydantic_settings import SettingsError as InvalidJsonError

from limiter.config.settings import (
    METERED_PATHS,
    VARIABLE_PREFIX,
    ModelNames,
    RelaySettings,
    Settings,
    TierSettings,
    Values,
)
from limiter.credits.models import MAX_COST
from limiter.errors import SettingsError
from limiter.redis.url import redacted

DEFAULT_FILE = Path("limiter.toml")
_NOT_SETTINGS = ("LIMITER_CONFIG", "LIMITER_TEST_")  # the path of the file; the tests' variables
_NAMED_TABLES: dict[str, type[BaseModel]] = {"tiers": TierSettings, "models": ModelNames}


@dataclass(frozen=True, slots=True)
class Setting:
    """One setting as `limiter config` shows it; a secret's value is masked already."""

    name: str
    value: str
    origin: str


def load_settings(file: Path | None = None, command_line: Values | None = None) -> tuple[Settings, list[Setting]]:
    """Return the settings in force, and each with the source of its value.

    file: a TOML file that must exist; by default that of LIMITER_CONFIG, or else `limiter.toml` if it exists.
    command_line: the values of options, as the file would hold them. Raises SettingsError.
    """
    path = file or Path(os.environ.get("LIMITER_CONFIG", DEFAULT_FILE))
    must_exist = file is not None or "LIMITER_CONFIG" in os.environ
    document = _read_toml(path, must_exist=must_exist)
    given = command_line or {}
    values: Any = {"file": document, "command_line": given}  # settings_customise_sources takes them apart
    _check_environment()
    try:
        settings = Settings(**values)
        settings.limits()
        _check_costs(settings)
        _check_hold(settings)
        _check_bodies(settings.relay)
        _check_on_redis_down(settings)
    except ValidationError as error:
        raise SettingsError(_explain(error, path)) from None
    except InvalidJsonError:
        variable = _variable_with_invalid_json()
        raise SettingsError(f"the environment's {variable} is not valid JSON, as a list or a table must be") from None
    return settings, list(_origins(settings, document, given, path))


def _read_toml(path: Path, *, must_exist: bool) -> Values:
    try:
        with path.open("rb") as handle:
            return tomllib.load(handle)
    except FileNotFoundError:
        if must_exist:
            raise SettingsError(f"there is no settings file {path}") from None
        return {}
    except OSError as error:
        raise SettingsError(f"the settings file {path} cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path} is not valid TOML: {error}") from None


def _check_environment() -> None:
    """Reject a misspelt section, which pydantic-settings would ignore; it checks the keys of known sections itself."""
    sections, tables = list(Settings.model_fields), _json_names()
    for name, value in os.environ.items():
        if not name.upper().startswith(VARIABLE_PREFIX) or name.startswith(_NOT_SETTINGS):
            continue
        section, separator, _ = name.lower().removeprefix(VARIABLE_PREFIX.lower()).partition("__")
        if section in sections and (separator or section in tables or value.lstrip().startswith("{")):
            continue
        known = [VARIABLE_PREFIX + key.upper().replace(".", "__") for key in _known_names()]
        raise SettingsError(f"the environment's {name} is not a setting{_nearest(name, known)}")


def _variable_with_invalid_json() -> str:
    """Return the variable that pydantic-settings could not parse; its own error names the section only."""
    structured = (*_json_names(), *_known_sections())
    for name in sorted(os.environ):
        field = name.lower().removeprefix(VARIABLE_PREFIX.lower()).replace("__", ".")
        if name.upper().startswith(VARIABLE_PREFIX) and field in structured:
            try:
                json.loads(os.environ[name])
            except ValueError:
                return name
    return f"{VARIABLE_PREFIX}*"


def _check_costs(settings: Settings) -> None:
    known = ["default", *METERED_PATHS]
    for name, cost in settings.costs.items():
        if name not in known:
            raise SettingsError(f"costs.{name} is not a path that costs credits{_nearest(name, known)}")
        if not 1 <= cost <= MAX_COST:
            raise SettingsError(f"costs.{name} is {cost}, want an integer from 1 to {MAX_COST} credits")


def _check_hold(settings: Settings) -> None:
    """Reject holds that could expire while a backend still works: their credits could be spent twice."""
    backends = settings.backends
    longest_s = settings.relay.upload_s + backends.gemini.timeout_s + backends.hardware.timeout_s
    if settings.relay.hold_s <= longest_s:
        raise SettingsError(
            f"relay.hold_s is {settings.relay.hold_s}, want more than {longest_s:g}: the sum of relay.upload_s, "
            "backends.gemini.timeout_s and backends.hardware.timeout_s"
        )


def _check_on_redis_down(settings: Settings) -> None:
    """Reject a fallback to hardware that is not configured; without any backend, the echo server stands for both."""
    backends = settings.backends
    if settings.redis.on_redis_down == "hardware" and not backends.hardware.url and backends.gemini.api_key:
        raise SettingsError(
            "redis.on_redis_down is hardware, but backends.hardware.url is not set: set it, or refuse requests while "
            "Redis is unavailable (deny)"
        )


def _check_bodies(relay: RelaySettings) -> None:
    """Reject a body limit that no body could reach: a client has a share of at most half of the memory."""
    if relay.bodies_in_memory_mb < 2 * relay.body_limit_mb:
        raise SettingsError(
            f"relay.bodies_in_memory_mb is {relay.bodies_in_memory_mb}, want at least twice relay.body_limit_mb, "
            f"which is {relay.body_limit_mb}: a larger body could not be read"
        )


def _explain(error: ValidationError, path: Path) -> str:
    """Return the first problem in one line, with the nearest known name; without the value, which may be a secret."""
    problem = error.errors(include_input=False, include_url=False)[0]
    name = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        known = [*_known_names(), *_known_sections()]
        table = _NAMED_TABLES.get(name.partition(".")[0])
        if table and name.count(".") > 1:
            known = [f"{name.rpartition('.')[0]}.{key}" for key in table.model_fields]
        return f"{name} is not a setting{_nearest(name, known)} (looked in {path} and {VARIABLE_PREFIX}*)"
    return f"setting {name}: {problem['msg'][0].lower()}{problem['msg'][1:]} (looked in {path} and {VARIABLE_PREFIX}*)"


def _nearest(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {near[0]}?" if near else f": the known ones are {', '.join(sorted(known))}"


def _json_names() -> list[str]:
    """Return the settings that are lists, or tables with free keys: an environment variable holds them as JSON."""
    return [name for name, kind in _members() if get_origin(kind) in (list, dict)]


def _known_sections() -> list[str]:
    return [name for name, kind in _members() if _is_section(kind)]


def _known_names() -> list[str]:
    return [name for name, kind in _members() if not _is_section(kind)]


def _members(model: type[BaseModel] = Settings, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every section and setting by its full name, with its type."""
    for name, info in model.model_fields.items():
        kind: Any = info.annotation
        yield prefix + name, kind
        if _is_section(kind):
            yield from _members(kind, f"{prefix}{name}.")


def _is_section(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def _origins(settings: Settings, document: Values, given: Values, path: Path) -> Iterator[Setting]:
    in_file, on_line, in_environment = (
        dict(_flat(document)),
        dict(_flat(given)),
        dict(_flat(EnvSettingsSource(Settings)())),
    )
    for name, value in _flat(settings.model_dump()):
        origin = "default"
        if name in on_line:
            origin = "command line"
        elif name in in_environment:
            origin = _variable(name)
        elif name in in_file:
            origin = str(path)
        yield Setting(name, _shown(name, value), origin)


def _variable(name: str) -> str:
    """Return the environment variable that holds a setting, by itself or within its table's JSON."""
    variables = {variable.upper(): variable for variable in os.environ}
    parts = name.upper().split(".")
    spellings = (VARIABLE_PREFIX + "__".join(parts[:count]) for count in range(len(parts), 0, -1))
    return next((variables[spelling] for spelling in spellings if spelling in variables), f"{VARIABLE_PREFIX}*")


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        elif value is not None:
            yield prefix + name, value


def _shown(name: str, value: object) -> str:
    if isinstance(value, SecretStr):
        return "***" if value.get_secret_value() else ""
    if isinstance(value, list):
        return json.dumps(value)  # as a variable or the file would have it
    return redacted(str(value)) if name.endswith(".url") else str(value)
