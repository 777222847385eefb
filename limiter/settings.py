"""The one module that reads settings: a TOML file, then the environment, then the command line, the later the stronger.

Unknown keys are errors that name the nearest known one. Secrets are shown as `***` wherever a setting is printed.
"""

import difflib
import json
import os
import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_origin

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, SecretStr, ValidationError
from pydantic_core import PydanticCustomError
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    InitSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)
from pydantic_settings import SettingsError as NoJsonError

from limiter.connection import redacted
from limiter.errors import SettingsError
from limiter.model import MAX_COST, Tiers

DEFAULT_FILE = Path("limiter.toml")
METERED_PATHS = (  # what a request can cost credits for; the relay serves these
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/embeddings",
    "/v1/responses",
    "/v1/audio/transcriptions",
)
_PREFIX = "LIMITER_"
_NOT_SETTINGS = ("LIMITER_CONFIG", "LIMITER_TEST_")  # the file itself; the tests' own
Values = dict[str, Any]  # a TOML document
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[a-z0-9.-]+(:[0-9]{1,5})?|[a-z]+://\[[0-9a-f:]+\](:[0-9]{1,5})?")

DEFAULT_TIERS: Values = {
    "core": {"lifetime": 50, "gemini_cap": 20, "max_in_flight": 4},
    "pro": {"monthly": 1000, "gemini_cap": 400, "max_in_flight": 16},
    "max": {"gemini_cap": 2000, "max_in_flight": 32},
}


def _no_flag(value: object) -> object:
    """Refuse true and false, which pydantic would take for 1 and 0."""
    if isinstance(value, bool):
        raise PydanticCustomError("no_number", "Input should be a number, not true or false")
    return value


def _origin(value: str) -> str:
    """Refuse what no browser sends as its origin, and so would never be equal to one."""
    if not _ORIGIN.fullmatch(value):
        raise PydanticCustomError(
            "no_origin", "Input should be an origin as browsers send it, like https://app.example"
        )
    return value


OnRedisDown = Literal["deny", "hardware"]
Origin = Annotated[str, AfterValidator(_origin)]
Whole = Annotated[int, BeforeValidator(_no_flag)]
Seconds = Annotated[float, BeforeValidator(_no_flag)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)


class RedisSettings(_Section):
    """[redis]. on_redis_down: refuse requests while Redis is away, or serve them from hardware, unmetered."""

    url: str = Field(default="embedded:./data", repr=False)
    prefix: str = "credits"
    timeout_ms: Whole = Field(default=1000, ge=10, le=60_000)
    allow_eviction: bool = False
    on_redis_down: OnRedisDown = "deny"
    deny_cache_ms: Whole = Field(default=1000, ge=0, le=1000)


class RelaySettings(_Section):
    """[relay]."""

    host: str = "127.0.0.1"
    port: Whole = Field(default=8080, ge=0, le=65_535)
    workers: Whole = Field(default=1, ge=0, le=256)
    body_limit_mb: Whole = Field(default=32, ge=1, le=4096)
    upload_limit_mb: Whole = Field(default=128, ge=1, le=65_536)
    bodies_in_memory_mb: Whole = Field(default=512, ge=1, le=1_048_576)
    upload_s: Seconds = Field(default=300, gt=0, le=3600)
    write_idle_s: Seconds = Field(default=60, gt=0, le=3600)
    keepalive_s: Seconds = Field(default=75, gt=0, le=3600)
    replay_limit_kb: Whole = Field(default=1024, ge=0, le=1_048_576)
    cors_origins: list[Origin] = []
    trusted_proxies: list[str] = []
    mint_per_ip: Whole = Field(default=20, ge=0, le=50_000)
    mint_overall: Whole = Field(default=10_000, ge=0, le=50_000)
    hold_s: Whole = Field(default=900, ge=1, le=86_400)
    drain_s: Whole = Field(default=30, ge=0, le=3600)


class BackendSettings(_Section):
    """What both tables of [backends] have."""

    url: str = Field(default="", repr=False)
    api_key: SecretStr = SecretStr("")
    connect_s: Seconds = Field(default=10, gt=0, le=600)
    timeout_s: Seconds = Field(default=300, gt=0, le=3600)
    idle_s: Seconds = Field(default=120, gt=0, le=3600)
    total_s: Seconds = Field(default=3600, gt=0, le=86_400)
    breaker_failures: Whole = Field(default=5, ge=0, le=1000)
    breaker_reset_s: Seconds = Field(default=10, gt=0, le=3600)


class GeminiSettings(BackendSettings):
    """[backends.gemini]. It is on when `api_key` is set."""

    url: str = Field(default="https://generativelanguage.googleapis.com/v1beta/openai", repr=False)
    timeout_s: Seconds = Field(default=120, gt=0, le=3600)


class HardwareSettings(BackendSettings):
    """[backends.hardware]. It is on when `url` is set."""


class BackendsSettings(_Section):
    """[backends]."""

    gemini: GeminiSettings = GeminiSettings()
    hardware: HardwareSettings = HardwareSettings()


class ModelNames(_Section):
    """One line of [models]: what each backend calls the model."""

    gemini: str | None = None
    hardware: str | None = None


class IdempotencySettings(_Section):
    """[idempotency]."""

    keep_s: Whole = Field(default=86_400, ge=1, le=2_592_000)
    answer_limit_kb: Whole = Field(default=1024, ge=0, le=65_536)
    retry_window_s: Whole = Field(default=60, ge=0, le=3600)


class LogSettings(_Section):
    """[logs]."""

    level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    format: Literal["auto", "json", "text"] = "auto"
    key: SecretStr = SecretStr("")


class LicenceSettings(_Section):
    """[licence]."""

    public_keys: list[str] = []


class PersisterSettings(_Section):
    """[persister]. It is off when `file` is empty."""

    file: str = "./data/credits.json"
    interval_s: Seconds = Field(default=60, ge=0.1, le=86_400)
    keep: Whole = Field(default=5, ge=1, le=1000)
    lease_s: Seconds = Field(default=30, ge=1, le=3600)


class TierSettings(_Section):
    """One table of [tiers]."""

    lifetime: Whole | None = None
    monthly: Whole | None = None
    gemini_cap: Whole | None = None
    max_in_flight: Whole | None = None


class Settings(BaseSettings):
    """All settings in force. Make one with `load_settings`."""

    model_config = SettingsConfigDict(
        env_prefix=_PREFIX,
        env_nested_delimiter="__",
        extra="forbid",
        frozen=True,
        hide_input_in_errors=True,
    )

    redis: RedisSettings = RedisSettings()
    relay: RelaySettings = RelaySettings()
    tiers: dict[str, TierSettings] = {}
    backends: BackendsSettings = BackendsSettings()
    models: dict[str, ModelNames] = {}
    costs: dict[str, Whole] = {}
    licence: LicenceSettings = LicenceSettings()
    idempotency: IdempotencySettings = IdempotencySettings()
    logs: LogSettings = LogSettings()
    persister: PersisterSettings = PersisterSettings()

    def limits(self) -> Tiers:
        """Give the tiers as the limiter takes them."""
        return Tiers.from_mapping({name: tier.model_dump() for name, tier in self.tiers.items()})

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003  an interface
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003  an interface
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Put the environment between the command line and the file, which arrive together as init values."""
        values = init_settings()
        return (
            InitSettingsSource(settings_cls, values.get("command_line", {})),
            env_settings,
            InitSettingsSource(settings_cls, values.get("file", {})),
            InitSettingsSource(settings_cls, _defaults(values.get("file", {}))),
        )


_NAMED_TABLES: dict[str, type[BaseModel]] = {"tiers": TierSettings, "models": ModelNames}


@dataclass(frozen=True, slots=True)
class Setting:
    """One setting as `limiter config` shows it; a secret's value is already masked."""

    name: str
    value: str
    origin: str


def load_settings(file: Path | None = None, command_line: Values | None = None) -> tuple[Settings, list[Setting]]:
    """Read the settings, and where each came from.

    file: a TOML file that must exist; without one `limiter.toml`, if it is there. Raises SettingsError.
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
    except NoJsonError:
        raise SettingsError(f"the environment's {_no_json()} is no JSON, as a list or a table must be there") from None
    return settings, list(_origins(settings, document, given, path))


def _defaults(document: Values) -> Values:
    """Give what holds where nothing is said: who gives [tiers] whole names them all, costs are filled up."""
    named = "tiers" in document or any(name.upper() == f"{_PREFIX}TIERS" for name in os.environ)
    return {"costs": {"default": 1}} | ({} if named else {"tiers": DEFAULT_TIERS})


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
        raise SettingsError(f"{path} is no TOML: {error}") from None


def _check_environment() -> None:
    """Refuse a misspelt section, which pydantic-settings would pass over; it checks the keys of known sections."""
    sections, tables = list(Settings.model_fields), _given_as_json()
    for name, value in os.environ.items():
        if not name.upper().startswith(_PREFIX) or name.startswith(_NOT_SETTINGS):
            continue
        section, separator, _ = name.lower().removeprefix(_PREFIX.lower()).partition("__")
        if section in sections and (separator or section in tables or value.lstrip().startswith("{")):
            continue
        known = [_PREFIX + key.upper().replace(".", "__") for key in _known_names()]
        raise SettingsError(f"the environment's {name} is no setting{_nearest(name, known)}")


def _no_json() -> str:
    """Give the variable that pydantic-settings could not read; its own error names the section only."""
    structured = (*_given_as_json(), *_known_sections())
    for name in sorted(os.environ):
        field = name.lower().removeprefix(_PREFIX.lower()).replace("__", ".")
        if name.upper().startswith(_PREFIX) and field in structured:
            try:
                json.loads(os.environ[name])
            except ValueError:
                return name
    return f"{_PREFIX}*"


def _check_costs(settings: Settings) -> None:
    known = ["default", *METERED_PATHS]
    for name, cost in settings.costs.items():
        if name not in known:
            raise SettingsError(f"costs.{name} is no path that costs credits{_nearest(name, known)}")
        if not 1 <= cost <= MAX_COST:
            raise SettingsError(f"costs.{name} is {cost}, want an integer from 1 to {MAX_COST} credits")


def _check_hold(settings: Settings) -> None:
    """Refuse holds that lapse while a backend still works: their credits would be spent twice."""
    backends = settings.backends
    longest_s = settings.relay.upload_s + backends.gemini.timeout_s + backends.hardware.timeout_s
    if settings.relay.hold_s <= longest_s:
        raise SettingsError(
            f"relay.hold_s is {settings.relay.hold_s}, want more than {longest_s:g}: what relay.upload_s, "
            "backends.gemini.timeout_s and backends.hardware.timeout_s are together"
        )


def _check_on_redis_down(settings: Settings) -> None:
    """Refuse to count on hardware that is not there; without any backend, the echo is both."""
    backends = settings.backends
    if settings.redis.on_redis_down == "hardware" and not backends.hardware.url and backends.gemini.api_key:
        raise SettingsError(
            "redis.on_redis_down is hardware, but backends.hardware.url is not set: set it, or let requests be refused "
            "while Redis is away (deny)"
        )


def _check_bodies(relay: RelaySettings) -> None:
    """Refuse a body limit that no body can come near."""
    if relay.bodies_in_memory_mb < relay.body_limit_mb:
        raise SettingsError(
            f"relay.bodies_in_memory_mb is {relay.bodies_in_memory_mb}, want at least relay.body_limit_mb, which is "
            f"{relay.body_limit_mb}: no larger body could be read"
        )


def _explain(error: ValidationError, path: Path) -> str:
    """Say the first problem in a line: which setting, what is wrong, what is near; never the value, a secret maybe."""
    problem = error.errors(include_input=False, include_url=False)[0]
    name = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        known = [*_known_names(), *_known_sections()]
        table = _NAMED_TABLES.get(name.partition(".")[0])
        if table and name.count(".") > 1:
            known = [f"{name.rpartition('.')[0]}.{key}" for key in table.model_fields]
        return f"{name} is no setting{_nearest(name, known)} (looked in {path} and {_PREFIX}*)"
    return f"setting {name}: {problem['msg'][0].lower()}{problem['msg'][1:]} (looked in {path} and {_PREFIX}*)"


def _nearest(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {near[0]}?" if near else f": known are {', '.join(sorted(known))}"


def _given_as_json(model: type[BaseModel] = Settings, prefix: str = "") -> list[str]:
    """List the lists, and the tables of whatever names: a variable holds one as JSON."""
    names: list[str] = []
    for name, info in model.model_fields.items():
        kind = info.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            names += _given_as_json(kind, f"{prefix}{name}.")
        elif get_origin(kind) in (list, dict):
            names.append(prefix + name)
    return names


def _known_sections(model: type[BaseModel] = Settings, prefix: str = "") -> list[str]:
    names: list[str] = []
    for name, info in model.model_fields.items():
        kind = info.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            names += [prefix + name, *_known_sections(kind, f"{prefix}{name}.")]
    return names


def _known_names(model: type[BaseModel] = Settings, prefix: str = "") -> list[str]:
    names: list[str] = []
    for name, info in model.model_fields.items():
        kind = info.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            names += _known_names(kind, f"{prefix}{name}.")
        else:
            names.append(prefix + name)
    return names


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
    """Give the environment's variable that holds a setting, by itself or inside its table's JSON."""
    variables = {variable.upper(): variable for variable in os.environ}
    parts = name.upper().split(".")
    spellings = (_PREFIX + "__".join(parts[:count]) for count in range(len(parts), 0, -1))
    return next((variables[spelling] for spelling in spellings if spelling in variables), f"{_PREFIX}*")


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        elif value is not None:
            yield prefix + name, value


def _shown(name: str, value: object) -> str:
    if isinstance(value, SecretStr):
        return "***" if value.get_secret_value() else ""
    return redacted(str(value)) if name.endswith(".url") else str(value)
