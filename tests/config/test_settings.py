"""Settings: the environment overrides the file, and the command line both; secrets are never shown."""

import os
from pathlib import Path

import pytest

from limiter.config.loader import Setting, load_settings
from limiter.config.settings import DEFAULT_TIERS, METERED_PATHS, Settings
from limiter.errors import SettingsError

SECRET = "the-secret-value"  # noqa: S105  it must not appear anywhere


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Start in an empty folder, without any settings."""
    for name in os.environ:
        if name.upper().startswith("LIMITER_"):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


def write(text: str, name: str = "limiter.toml") -> Path:
    path = Path(name)
    path.write_text(text)
    return path


def load(text: str = "", **command_line: dict[str, object]) -> Settings:
    if text:
        write(text)
    return load_settings(None, command_line)[0]


def refused(text: str = "", file: Path | None = None) -> str:
    """Return the message for settings that are not valid, which must be one line."""
    if text:
        write(text)
    with pytest.raises(SettingsError) as raised:
        load_settings(file)
    message = str(raised.value)
    assert "\n" not in message
    assert SECRET not in message
    assert SECRET not in repr(raised.value)
    # There must be no chained error that a traceback would print with the value in it.
    assert raised.value.__cause__ is None
    assert raised.value.__suppress_context__ or raised.value.__context__ is None
    return message


def shown() -> dict[str, Setting]:
    return {setting.name: setting for setting in load_settings()[1]}


# Precedence


def test_settings_when_nothing_is_configured_then_the_defaults_apply() -> None:
    settings = load()
    assert settings.redis.url == "embedded:./data"
    assert (settings.relay.host, settings.relay.port) == ("127.0.0.1", 8080)
    assert set(settings.limits()) == {"core", "pro", "max"}
    assert settings.limits()["max"].quota is None
    assert settings.costs == {"default": 1}
    assert not settings.backends.gemini.api_key.get_secret_value()


def test_settings_when_set_in_several_places_then_the_one_with_precedence_applies(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    text = '[relay]\nport = 1001\nhost = "file"\nbody_limit_mb = 1\n'
    assert load(text).relay.port == 1001
    monkeypatch.setenv("LIMITER_RELAY__PORT", "1002")
    monkeypatch.setenv("LIMITER_RELAY__HOST", "environment")
    settings = load(text, relay={"port": 1003})
    assert (settings.relay.port, settings.relay.host) == (1003, "environment")
    assert (settings.relay.body_limit_mb, settings.relay.drain_s) == (1, 30)


def test_origin_when_shown_then_it_is_the_source_of_the_value(monkeypatch: pytest.MonkeyPatch) -> None:
    write('[relay]\nport = 1001\nhost = "file"\ndrain_s = 5\n')
    monkeypatch.setenv("LIMITER_RELAY__HOST", "environment")
    monkeypatch.setenv("limiter_relay__hold_s", "900")
    settings = {item.name: item for item in load_settings(None, {"relay": {"port": 1003}})[1]}
    assert (settings["relay.port"].value, settings["relay.port"].origin) == ("1003", "command line")
    assert (settings["relay.host"].value, settings["relay.host"].origin) == ("environment", "LIMITER_RELAY__HOST")
    assert (settings["relay.hold_s"].value, settings["relay.hold_s"].origin) == ("900", "limiter_relay__hold_s")
    assert (settings["relay.drain_s"].value, settings["relay.drain_s"].origin) == ("5", "limiter.toml")
    assert (settings["redis.prefix"].value, settings["redis.prefix"].origin) == ("credits", "default")


def test_origin_when_a_variable_holds_json_then_it_is_named_for_each_value(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIMITER_TIERS__PRO", '{"monthly": 7}')
    pro = shown()["tiers.pro.monthly"]
    assert (pro.value, pro.origin) == ("7", "LIMITER_TIERS__PRO")


def test_file_when_it_is_named_then_it_alone_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write("[relay]\nport = 1\n")
    other = write("[relay]\nport = 2\n", "other.toml")
    assert load_settings(other)[0].relay.port == 2
    monkeypatch.setenv("LIMITER_CONFIG", str(tmp_path / "other.toml"))
    assert load_settings()[0].relay.port == 2
    assert load_settings(Path("limiter.toml"))[0].relay.port == 1


def test_file_when_it_is_named_and_missing_then_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert refused(file=Path("none.toml")) == "there is no settings file none.toml"
    monkeypatch.setenv("LIMITER_CONFIG", "none.toml")
    assert refused() == "there is no settings file none.toml"


def test_file_when_it_is_a_folder_then_refused() -> None:
    Path("folder").mkdir()
    assert "folder cannot be read" in refused(file=Path("folder"))


@pytest.mark.parametrize(
    "text", ["[relay", "relay = ", f'[redis]\nurl = "{SECRET}', '{"relay": {}}', "[relay]\nport = 1\nport = 2"]
)
def test_file_when_it_is_not_valid_toml_then_refused_and_the_line_is_named(text: str) -> None:
    message = refused(text)
    assert message.startswith("limiter.toml is not valid TOML: ")
    assert "line" in message or "end of document" in message


def test_file_when_its_bytes_are_not_utf_8_then_refused() -> None:
    Path("limiter.toml").write_bytes(b'[redis]\nurl = "\xff"\n')
    assert refused().startswith("limiter.toml is not valid TOML: ")


# Unknown names


@pytest.mark.parametrize(
    ("text", "name", "near"),
    [
        ("[relay]\nprot = 1", "relay.prot", "relay.port"),
        ('[redis]\nuri = "x"', "redis.uri", "redis.url"),
        ("[relays]\nport = 1", "relays", "relay"),
        ('[backends.gemeni]\nurl = "x"', "backends.gemeni", "backends.gemini"),
        ('[backends.gemini]\napikey = "x"', "backends.gemini.apikey", "backends.gemini.api_key"),
        ('[license]\npublic_keys = ["x"]', "license", "licence"),
        ("[tiers.core]\nlifetyme = 1", "tiers.core.lifetyme", "tiers.core.lifetime"),
        ("[tiers.core]\nlifetime = 1\n[tiers.pro]\nmontly = 1", "tiers.pro.montly", "tiers.pro.monthly"),
        ('[models.recap]\ngemeni = "x"', "models.recap.gemeni", "models.recap.gemini"),
        ("[persister]\ninterval = 1", "persister.interval", "persister.interval_s"),
        ("port = 1", "port", "relay.port"),
    ],
)
def test_key_when_the_file_has_an_unknown_one_then_the_nearest_is_named(text: str, name: str, near: str) -> None:
    assert refused(text).startswith(f"{name} is not a setting; did you mean {near}?")


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("LIMITER_RELAY_PORT", "LIMITER_RELAY__PORT"),
        ("LIMITER_REDIS_URL", "LIMITER_REDIS__URL"),
        ("LIMITER_REALY__PORT", "LIMITER_RELAY__PORT"),
        ("LIMITER_REDIS", "LIMITER_REDIS__URL"),
    ],
)
def test_variable_when_its_section_is_unknown_then_the_nearest_is_named(
    monkeypatch: pytest.MonkeyPatch, name: str, near: str
) -> None:
    monkeypatch.setenv(name, SECRET)
    assert refused() == f"the environment's {name} is not a setting; did you mean {near}?"


def test_variable_when_its_key_is_unknown_then_the_nearest_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIMITER_RELAY__PROT", SECRET)
    assert refused().startswith("relay.prot is not a setting; did you mean relay.port?")


def test_variable_when_it_belongs_to_the_tests_then_it_is_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIMITER_TEST_REDIS_URL", "redis://elsewhere")
    assert load().redis.url == "embedded:./data"


# Values


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ('[relay]\nport = "many"', "relay.port"),
        ("[relay]\nport = 65536", "relay.port"),
        ("[relay]\nport = -1", "relay.port"),
        ("[relay]\nport = 1.5", "relay.port"),
        ("[relay]\nport = true", "relay.port"),
        ("[relay]\nport = [1]", "relay.port"),
        ("[relay]\nhost = 1", "relay.host"),
        ("relay = 5", "relay"),
        ("[[relay]]\nport = 1", "relay"),
        ("[redis]\nurl = 5", "redis.url"),
        ("[redis]\ntimeout_ms = 0", "redis.timeout_ms"),
        ('[redis]\nallow_eviction = "perhaps"', "redis.allow_eviction"),
        ("[backends.gemini]\ntimeout_s = 0", "backends.gemini.timeout_s"),
        ("[backends.gemini]\ntimeout_s = nan", "backends.gemini.timeout_s"),
        ("[backends.gemini]\ntimeout_s = inf", "backends.gemini.timeout_s"),
        ("[backends.gemini]\nkeepalive_s = -1", "backends.gemini.keepalive_s"),
        ("[backends.hardware]\nmax_connections = -1", "backends.hardware.max_connections"),
        ("[backends.hardware]\nmax_connections = true", "backends.hardware.max_connections"),
        ("[backends.hardware]\nca_file = 5", "backends.hardware.ca_file"),
        ("[relay]\nmax_connections = -1", "relay.max_connections"),
        ("[backends.gemini]\napi_key = 5", "backends.gemini.api_key"),
        ("[backends.gemini]\nroutes = []", "backends.gemini.routes"),
        ('[backends.hardware]\nroutes = ["/v1/models"]', "backends.hardware.routes.0"),
        ('[licence]\npublic_keys = "one"', "licence.public_keys"),
        ("[persister]\ninterval_s = 0", "persister.interval_s"),
        ('[models]\nrecap = "gemini-2.5-flash"', "models.recap"),
        ('[tiers.core]\nlifetime = "many"', "tiers.core.lifetime"),
        ("[tiers.core]\nlifetime = true", "tiers.core.lifetime"),
        ("[tiers.core]\nlifetime = 1.5", "tiers.core.lifetime"),
        ("[costs]\ndefault = true", "costs.default"),
        ('[costs]\n"/v1/embeddings" = "one"', "costs./v1/embeddings"),
    ],
)
def test_value_when_its_type_or_bound_is_wrong_then_the_setting_is_named(text: str, name: str) -> None:
    assert refused(text).startswith(f"setting {name}: ")


def test_value_when_it_is_wrong_in_the_environment_then_it_is_not_quoted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIMITER_RELAY__PORT", SECRET)
    assert refused().startswith("setting relay.port: ")


@pytest.mark.parametrize("name", ["LIMITER_LICENCE__PUBLIC_KEYS", "LIMITER_TIERS__PRO", "LIMITER_BACKENDS__GEMINI"])
def test_value_when_the_environment_needs_json_and_has_none_then_refused(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv(name, SECRET)
    message = refused()
    assert name in message or message.startswith("setting tiers.pro: ")


@pytest.mark.parametrize(
    "name",
    [
        "LIMITER_TIERS",
        "LIMITER_MODELS",
        "LIMITER_COSTS",
        "LIMITER_RELAY__TRUSTED_PROXIES",
        "LIMITER_BACKENDS__HARDWARE",
    ],
)
def test_value_when_the_environment_needs_json_and_has_text_then_the_variable_is_named(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv(name, SECRET)
    assert refused() == f"the environment's {name} is not valid JSON, as a list or a table must be"


def test_table_when_the_environment_has_all_of_it_as_json_then_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIMITER_MODELS", '{"a/b": {"gemini": "g", "hardware": "h"}, "c": {"hardware": "d"}}')
    monkeypatch.setenv("LIMITER_COSTS", '{"/v1/embeddings": 2}')
    monkeypatch.setenv("LIMITER_RELAY", '{"port": 7}')
    monkeypatch.setenv("LIMITER_BACKENDS", '{"hardware": {"url": "http://gpu:8000/v1"}}')
    settings = load('[models.c]\ngemini = "kept"\n[relay]\nport = 5\nhost = "::1"\n')
    assert {name: (to.gemini, to.hardware) for name, to in settings.models.items()} == {
        "a/b": ("g", "h"),
        "c": ("kept", "d"),
    }
    assert settings.costs == {"default": 1, "/v1/embeddings": 2}
    assert (settings.relay.port, settings.relay.host) == (7, "::1")
    assert settings.backends.hardware.url == "http://gpu:8000/v1"
    rows = shown()
    assert (rows["models.a/b.gemini"].value, rows["models.a/b.gemini"].origin) == ("g", "LIMITER_MODELS")


@pytest.mark.parametrize(
    ("name", "value", "near"),
    [
        ("LIMITER_MODELS", '{"recap": {"gemeni": "x"}}', "models.recap.gemini"),
        ("LIMITER_TIERS", '{"core": {"lifetyme": 1}}', "tiers.core.lifetime"),
        ("LIMITER_RELAY", '{"prot": 1}', "relay.port"),
    ],
)
def test_table_when_the_environments_json_has_an_unknown_key_then_the_nearest_is_named(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, near: str
) -> None:
    monkeypatch.setenv(name, value)
    assert f" is not a setting; did you mean {near}?" in refused()


def test_variable_when_its_name_is_in_lower_case_then_it_is_read_and_checked_alike(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("limiter_relay__port", "9")
    assert load().relay.port == 9
    monkeypatch.setenv("limiter_realy__port", "9")
    assert "limiter_realy__port is not a setting" in refused()


def test_keys_when_the_environment_has_a_list_then_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIMITER_LICENCE__PUBLIC_KEYS", '["ed25519:a", "ed25519:b"]')
    assert load().licence.public_keys == ["ed25519:a", "ed25519:b"]


@pytest.mark.parametrize("cost", [0, -1, 1_000_001])
def test_costs_when_out_of_bounds_then_refused(cost: int) -> None:
    assert refused(f'[costs]\n"/v1/embeddings" = {cost}').startswith(f"costs./v1/embeddings is {cost}, want ")


@pytest.mark.parametrize(
    ("path", "hint"),
    [
        ("/v1/embedding", "; did you mean /v1/embeddings?"),
        ("/v1/chat/completion", "; did you mean /v1/chat/completions?"),
        ("defualt", "; did you mean default?"),
        ("gemini", ": the known ones are /v1/audio/transcriptions, "),
    ],
)
def test_costs_when_the_path_is_not_metered_then_refused(path: str, hint: str) -> None:
    assert refused(f'[costs]\n"{path}" = 2').startswith(f"costs.{path} is not a path that costs credits{hint}")


def test_costs_when_a_path_is_metered_then_it_can_have_a_cost_of_its_own() -> None:
    from limiter.relay.app import _ROUTES  # noqa: PLC0415  a table of the module
    from limiter.relay.handlers.metered import serve_json, serve_upload  # noqa: PLC0415

    assert tuple(path for _, path, serve in _ROUTES if serve in (serve_json, serve_upload)) == METERED_PATHS


def test_costs_when_only_one_is_set_then_the_default_stays() -> None:
    settings = load('[costs]\n"/v1/embeddings" = 2')
    assert settings.costs == {"default": 1, "/v1/embeddings": 2}
    assert load("[costs]\ndefault = 3").costs == {"default": 3}


# Tiers


def test_tiers_when_the_file_has_some_then_they_replace_the_default_ones() -> None:
    limits = load("[tiers.core]\nlifetime = 5\n[tiers.gold]\nmonthly = 7\ngemini_cap = 3\n").limits()
    assert set(limits) == {"core", "gold"}
    assert (limits["core"].counter, limits["core"].quota, limits["core"].gemini_cap) == ("lifetime", 5, None)
    assert (limits["gold"].counter, limits["gold"].quota, limits["gold"].gemini_cap) == ("monthly", 7, 3)


def test_tiers_when_core_is_missing_then_refused() -> None:
    assert "core" in refused("[tiers.pro]\nmonthly = 5\n")
    assert "core" in refused("[tiers]\n")


def test_tiers_when_one_is_lifetime_and_monthly_then_refused() -> None:
    assert refused("[tiers.core]\nlifetime = 5\nmonthly = 5\n") == "tier 'core' has both lifetime and monthly: give one"


@pytest.mark.parametrize("limit", ["lifetime", "gemini_cap", "max_in_flight"])
def test_tiers_when_a_limit_is_negative_then_refused(limit: str) -> None:
    assert refused(f"[tiers.core]\n{limit} = -1\n").startswith(f"tier 'core': {limit} is -1")


@pytest.mark.parametrize("name", ["a b", "", "x" * 21, "é"])
def test_tiers_when_a_name_is_not_valid_then_refused(name: str) -> None:
    assert "is not usable" in refused(f'[tiers.core]\nlifetime = 1\n[tiers."{name}"]\nmonthly = 1\n')


def test_tiers_when_the_environment_sets_a_limit_then_the_default_tiers_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIMITER_TIERS__PRO__MONTHLY", "7")
    settings = load()
    assert set(settings.limits()) == set(DEFAULT_TIERS)
    assert (settings.limits()["pro"].quota, settings.limits()["pro"].gemini_cap) == (7, 400)
    assert settings.limits()["core"].quota == 50


def test_tiers_when_the_environment_overrides_a_limit_of_the_file_then_the_rest_stays(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("LIMITER_TIERS__CORE__LIFETIME", "7")
    limits = load("[tiers.core]\nlifetime = 5\ngemini_cap = 2\n").limits()
    assert set(limits) == {"core"}
    assert (limits["core"].quota, limits["core"].gemini_cap) == (7, 2)


def test_tiers_when_the_environment_has_all_of_them_as_json_then_they_replace_the_default_ones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("LIMITER_TIERS", '{"core": {"lifetime": 5}, "gold": {"monthly": 7}}')
    monkeypatch.setenv("LIMITER_TIERS__GOLD__GEMINI_CAP", "3")
    limits = load().limits()
    assert set(limits) == {"core", "gold"}
    assert (limits["core"].quota, limits["core"].gemini_cap) == (5, None)
    assert (limits["gold"].quota, limits["gold"].gemini_cap) == (7, 3)


# Secrets


SECRETS = f"""
[redis]
url = "rediss://user:{SECRET}@host:6380/0?ssl_cert_reqs=none"
[backends.gemini]
api_key = "{SECRET}"
[backends.hardware]
url = "http://user:{SECRET}@gpu:8000/v1"
api_key = "{SECRET}"
"""


def test_secrets_when_settings_are_printed_then_they_are_masked() -> None:
    settings = load(SECRETS)
    for text in (repr(settings), str(settings), f"{settings}", repr(settings.redis), repr(settings.backends)):
        assert SECRET not in text
    rows = shown()
    assert SECRET not in str(rows)
    assert rows["redis.url"].value == "rediss://user:***@host:6380/0?ssl_cert_reqs=none"
    assert rows["backends.gemini.api_key"].value == "***"
    assert rows["backends.hardware.api_key"].value == "***"
    assert rows["backends.hardware.url"].value == "http://user:***@gpu:8000/v1"
    assert settings.backends.gemini.api_key.get_secret_value() == SECRET


@pytest.mark.parametrize(
    "url",
    [
        f"redis://:{SECRET}@host",
        f"redis://host?password={SECRET}",
        f"redis://user:{SECRET}@[::1]:6379/0",
        f"unix://user:{SECRET}@/run/redis.sock",
    ],
)
def test_secrets_when_the_url_has_a_password_anywhere_then_it_is_masked(url: str) -> None:
    load(f'[redis]\nurl = "{url}"\n')
    assert SECRET not in shown()["redis.url"].value


def test_secrets_when_no_key_is_set_then_nothing_is_masked() -> None:
    assert shown()["backends.gemini.api_key"].value == ""


@pytest.mark.parametrize(
    "text",
    [
        f'[redis]\nurl = "redis://:{SECRET}@host"\nwrong = "{SECRET}"\n',
        f'[backends.gemini]\napi_key = ["{SECRET}"]\n',
        f'[backends.hardware]\nurl = {{ "{SECRET}" = 1 }}\n',
        f'[relay]\nport = "{SECRET}"\n',
        f'[licence]\npublic_keys = "{SECRET}"\n',
    ],
)
def test_secrets_when_a_setting_is_refused_then_no_value_is_quoted(text: str) -> None:
    refused(text)


def test_hold_when_it_could_expire_while_a_backend_works_then_it_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LIMITER_RELAY__HOLD_S", "720")
    with pytest.raises(SettingsError, match=r"relay\.hold_s is 720, want more than 720: the sum of relay"):
        load_settings()


# While Redis is unavailable

GEMINI_ONLY = '[backends.gemini]\napi_key = "k"\n'


def test_on_redis_down_when_it_is_hardware_and_hardware_is_not_configured_then_it_is_refused() -> None:
    with pytest.raises(
        SettingsError, match=r"redis\.on_redis_down is hardware, but backends\.hardware\.url is not set"
    ):
        load(f'[redis]\non_redis_down = "hardware"\n{GEMINI_ONLY}')


@pytest.mark.parametrize("backends", ["", GEMINI_ONLY + '[backends.hardware]\nurl = "http://localhost:1/v1"\n'])
def test_on_redis_down_when_hardware_is_configured_or_the_echo_answers_then_it_is_accepted(backends: str) -> None:
    assert load(f'[redis]\non_redis_down = "hardware"\n{backends}').redis.on_redis_down == "hardware"


def test_on_redis_down_when_it_is_not_set_then_requests_are_refused_and_another_value_is_an_error() -> None:
    assert load().redis.on_redis_down == "deny"
    with pytest.raises(SettingsError, match=r"redis\.on_redis_down: input should be 'deny' or 'hardware'"):
        load('[redis]\non_redis_down = "gemini"\n')


def test_bodies_in_memory_when_the_largest_body_would_not_fit_then_refused() -> None:
    message = refused("[relay]\nbodies_in_memory_mb = 63")
    assert message.startswith("relay.bodies_in_memory_mb is 63, want at least twice relay.body_limit_mb, which is 32")


# Origins


@pytest.mark.parametrize(
    "origin", ["https://app.example", "http://localhost:5173", "http://[::1]:80", "tauri://localhost"]
)
def test_origin_when_browsers_send_it_in_this_form_then_it_is_accepted(origin: str) -> None:
    assert load(relay={"cors_origins": [origin]}).relay.cors_origins == [origin]


@pytest.mark.parametrize(
    "origin", ["*", "null", "app.example", "https://app.example/", "https://App.example", "https://*.example", ""]
)
def test_origin_when_it_could_never_match_then_it_is_refused(origin: str) -> None:
    message = refused(f'[relay]\ncors_origins = ["{origin}"]')
    assert "relay.cors_origins.0: input should be an origin" in message


def test_origins_when_the_environment_has_them_as_json_then_they_are_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIMITER_RELAY__CORS_ORIGINS", '["https://app.example"]')
    assert load().relay.cors_origins == ["https://app.example"]
    monkeypatch.setenv("LIMITER_RELAY__CORS_ORIGINS", "https://app.example")
    assert "LIMITER_RELAY__CORS_ORIGINS is not valid JSON" in refused()
