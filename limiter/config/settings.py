"""The schema of the settings: sections, bounds and defaults. `loader` reads their values.

Secrets are pydantic's SecretStr, and URLs are kept out of each repr: they may hold a password.
"""

import os
import re
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, SecretStr
from pydantic_core import PydanticCustomError
from pydantic_settings import BaseSettings, InitSettingsSource, PydanticBaseSettingsSource, SettingsConfigDict

from limiter.credits.models import Tiers

MeteredPath = Literal[
    "/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses", "/v1/audio/transcriptions"
]
METERED_PATHS: tuple[MeteredPath, ...] = get_args(MeteredPath)  # the relay's paths on which a request costs credits
VARIABLE_PREFIX = "LIMITER_"
Values = dict[str, Any]  # a TOML document
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[a-z0-9.-]+(:[0-9]{1,5})?|[a-z]+://\[[0-9a-f:]+\](:[0-9]{1,5})?")

DEFAULT_TIERS: Values = {
    "core": {"lifetime": 50, "gemini_cap": 20, "max_in_flight": 4, "rate_per_min": 60, "burst": 60},
    "pro": {"monthly": 1000, "gemini_cap": 400, "max_in_flight": 16, "rate_per_min": 240, "burst": 120},
    "max": {"gemini_cap": 2000, "max_in_flight": 32, "rate_per_min": 600, "burst": 300},
}


def _reject_bool(value: object) -> object:
    """Reject true and false, which pydantic would accept as 1 and 0."""
    if isinstance(value, bool):
        raise PydanticCustomError("not_a_number", "Input should be a number, not true or false")
    return value


def _check_origin(value: str) -> str:
    """Reject text that no browser sends as an origin, as it would never match."""
    if not _ORIGIN.fullmatch(value):
        raise PydanticCustomError(
            "not_an_origin", "Input should be an origin as browsers send it, like https://app.example"
        )
    return value


_OF_A_REQUEST = {"max_n", "max_inputs", "max_output_tokens"}
OnRedisDown = Literal["deny", "hardware"]
BoundsMode = Literal["enforce", "log"]
ServedModels = Literal["any", "listed"]
Origin = Annotated[str, AfterValidator(_check_origin)]
Whole = Annotated[int, BeforeValidator(_reject_bool)]
Seconds = Annotated[float, BeforeValidator(_reject_bool)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)


class RedisSettings(_Section):
    """[redis]. on_redis_down: refuse requests while Redis is unavailable, or serve them unmetered from hardware."""

    url: str = Field(default="embedded:./data", repr=False)
    prefix: str = "credits"
    timeout_ms: Whole = Field(default=1000, ge=10, le=60_000)
    allow_eviction: bool = False
    on_redis_down: OnRedisDown = "deny"
    deny_cache_ms: Whole = Field(default=1000, ge=0, le=1000)
    wait_replicas: Whole = Field(default=0, ge=0, le=100)
    embedded_maxmemory_mb: Whole = Field(default=1024, ge=0, le=1_048_576)


class RelaySettings(_Section):
    """[relay]."""

    host: str = "127.0.0.1"
    port: Whole = Field(default=8080, ge=0, le=65_535)
    workers: Whole = Field(default=1, ge=0, le=256)
    body_limit_mb: Whole = Field(default=32, ge=1, le=4096)
    upload_limit_mb: Whole = Field(default=128, ge=1, le=65_536)
    bodies_in_memory_mb: Whole = Field(default=512, ge=1, le=1_048_576)
    upload_s: Seconds = Field(default=300, gt=0, le=3600)
    body_idle_s: Seconds = Field(default=30, gt=0, le=3600)
    body_min_rate_kb: Whole = Field(default=1, ge=0, le=1_048_576)
    write_idle_s: Seconds = Field(default=60, gt=0, le=3600)
    keepalive_s: Seconds = Field(default=75, gt=0, le=3600)
    head_s: Seconds = Field(default=15, gt=0, le=3600)
    max_connections: Whole = Field(default=0, ge=0, le=1_000_000)
    max_connections_per_address: Whole = Field(default=256, ge=0, le=1_000_000)
    rate_per_min_per_address: Whole = Field(default=1200, ge=0, le=1_000_000)
    exempt_networks: list[str] = ["127.0.0.0/8", "::1"]
    inside_networks: list[str] = ["127.0.0.0/8", "::1", "10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "fc00::/7"]
    replay_limit_kb: Whole = Field(default=1024, ge=0, le=1_048_576)
    bounds: BoundsMode = "enforce"
    models: ServedModels = "any"
    cors_origins: list[Origin] = []
    trusted_proxies: list[str] = []
    mint_per_ip: Whole = Field(default=20, ge=0, le=50_000)
    mint_per_ipv4_24: Whole = Field(default=200, ge=0, le=50_000)
    mint_per_ipv6_48: Whole = Field(default=100, ge=0, le=50_000)
    mint_per_ipv6_32: Whole = Field(default=1000, ge=0, le=50_000)
    mint_overall: Whole = Field(default=10_000, ge=0, le=50_000)
    hold_s: Whole = Field(default=900, ge=1, le=86_400)
    first_event_s: Seconds = Field(default=15, gt=0, le=3600)
    drain_s: Whole = Field(default=30, ge=0, le=3600)


class BackendSettings(_Section):
    """The settings that both tables of [backends] have. routes: the metered paths that the backend has."""

    url: str = Field(default="", repr=False)
    api_key: SecretStr = SecretStr("")
    routes: list[MeteredPath] = Field(default=list(METERED_PATHS), min_length=1)
    connect_s: Seconds = Field(default=10, gt=0, le=600)
    timeout_s: Seconds = Field(default=300, gt=0, le=3600)
    idle_s: Seconds = Field(default=120, gt=0, le=3600)
    total_s: Seconds = Field(default=3600, gt=0, le=86_400)
    breaker_failures: Whole = Field(default=5, ge=0, le=1000)
    breaker_reset_s: Seconds = Field(default=10, gt=0, le=3600)
    keepalive_s: Seconds = Field(default=4, ge=0, le=3600)
    max_connections: Whole = Field(default=0, ge=0, le=1_000_000)
    ca_file: str = ""


class GeminiSettings(BackendSettings):
    """[backends.gemini]. Enabled when `api_key` is set."""

    url: str = Field(default="https://generativelanguage.googleapis.com/v1beta/openai", repr=False)
    # What Gemini has of OpenAI's API: https://ai.google.dev/gemini-api/docs/openai
    routes: list[MeteredPath] = Field(default=["/v1/chat/completions", "/v1/embeddings"], min_length=1)
    timeout_s: Seconds = Field(default=120, gt=0, le=3600)


class HardwareSettings(BackendSettings):
    """[backends.hardware]. Enabled when `url` is set."""


class BackendsSettings(_Section):
    """[backends]."""

    gemini: GeminiSettings = GeminiSettings()
    hardware: HardwareSettings = HardwareSettings()


class ModelNames(_Section):
    """One entry of [models]: each backend's name for the model."""

    gemini: str | None = None
    hardware: str | None = None


class IdempotencySettings(_Section):
    """[idempotency]."""

    keep_s: Whole = Field(default=86_400, ge=1, le=2_592_000)
    answer_limit_kb: Whole = Field(default=1024, ge=0, le=65_536)
    retry_window_s: Whole = Field(default=60, ge=0, le=3600)
    keep_mb_per_install: Whole = Field(default=8, ge=0, le=1_048_576)
    keep_mb: Whole = Field(default=256, ge=0, le=1_048_576)


class LogSettings(_Section):
    """[logs]."""

    level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    format: Literal["auto", "json", "text"] = "auto"
    key: SecretStr = SecretStr("")
    events_per_s: Whole = Field(default=20, ge=0, le=1_000_000)
    requests_per_s: Whole = Field(default=1000, ge=0, le=1_000_000)


class LicenceSettings(_Section):
    """[licence]."""

    public_keys: list[str] = []


class PersisterSettings(_Section):
    """[persister]. Disabled when `file` is empty."""

    file: str = "./data/credits.json"
    interval_s: Seconds = Field(default=60, ge=0.1, le=86_400)
    keep: Whole = Field(default=5, ge=1, le=1000)
    lease_s: Seconds = Field(default=30, ge=1, le=3600)


class TierSettings(_Section):
    """One table of [tiers]. The bounds of single requests, which the relay keeps by itself, are not in `limits`."""

    lifetime: Whole | None = None
    monthly: Whole | None = None
    gemini_cap: Whole | None = None
    max_in_flight: Whole | None = None
    max_n: Whole = Field(default=4, ge=0, le=1_000_000)
    max_inputs: Whole = Field(default=256, ge=0, le=4096)
    max_output_tokens: Whole = Field(default=32_768, ge=0, le=1_000_000_000)
    rate_per_min: Whole | None = None
    burst: Whole | None = None
    free_leaves: Whole | None = 5


class Settings(BaseSettings):
    """All settings in force. Create it with `load_settings`."""

    model_config = SettingsConfigDict(
        env_prefix=VARIABLE_PREFIX,
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
        """Return the tiers in the form that the limiter takes."""
        return Tiers.from_mapping({name: tier.model_dump(exclude=_OF_A_REQUEST) for name, tier in self.tiers.items()})

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003  an interface
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003  an interface
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Rank the environment between the command line and the file, which are both passed as init values."""
        values = init_settings()
        return (
            InitSettingsSource(settings_cls, values.get("command_line", {})),
            env_settings,
            InitSettingsSource(settings_cls, values.get("file", {})),
            InitSettingsSource(settings_cls, _defaults(values.get("file", {}))),
        )


def _defaults(document: Values) -> Values:
    """Return the defaults: a configured [tiers] replaces the default tiers, [costs] is merged with its default."""
    has_tiers = "tiers" in document or any(name.upper() == f"{VARIABLE_PREFIX}TIERS" for name in os.environ)
    return {"costs": {"default": 1}} | ({} if has_tiers else {"tiers": DEFAULT_TIERS})
