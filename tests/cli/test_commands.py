"""The commands, run as processes: what they print, and how they fail."""

import json
import stat
from pathlib import Path

import pytest
from redis.asyncio import Redis

from limiter import CreditLimiter
from limiter.redis.lua_source import compose, script_names
from tests.support.cli import limiter
from tests.support.credits import TIERS

COMMANDS = ["serve", "persist", "import", "dump", "verify", "restore", "row", "prune", "config"]
GROUPS = {
    "licence": ["keygen", "issue", "show", "revoke", "restore", "revoked", "seats"],
    "lua": ["names", "show", "sha"],
}
INSTALL = "5f0c1c1e-8d3a-4a53-9a0e-0d8f2f6f3c11"


def test_help_lists_every_command(tmp_path: Path) -> None:
    text = limiter("--help", cwd=tmp_path).stdout
    assert all(f" {name} " in text for name in [*COMMANDS, *GROUPS])


@pytest.mark.slow
@pytest.mark.parametrize(
    "command", [[name] for name in COMMANDS] + [[group, name] for group, names in GROUPS.items() for name in names]
)
def test_help_of_every_command_shows_an_example(command: list[str], tmp_path: Path) -> None:
    answer = limiter(*command, "--help", cwd=tmp_path)
    assert answer.returncode == 0
    assert f"limiter {' '.join(command)}" in answer.stdout.partition("Example")[2]


def test_wrong_usage_exits_2(tmp_path: Path) -> None:
    assert limiter("row", cwd=tmp_path).returncode == 2
    assert limiter("serve", "--port", "many", cwd=tmp_path).returncode == 2
    assert limiter("fly", cwd=tmp_path).returncode == 2


def test_config_prints_value_and_origin_and_masks_secrets(tmp_path: Path) -> None:
    (tmp_path / "limiter.toml").write_text('[relay]\nport = 8181\n[backends.gemini]\napi_key = "very-secret"\n')
    settings = {"LIMITER_RELAY__HOST": "0.0.0.0", "LIMITER_REDIS__URL": "redis://me:hush@localhost/0"}
    answer = limiter("config", "--json", cwd=tmp_path, settings=settings)
    items = {item["name"]: (item["value"], item["origin"]) for item in json.loads(answer.stdout)}
    assert items["relay.port"] == ("8181", "limiter.toml")
    assert items["relay.host"] == ("0.0.0.0", "LIMITER_RELAY__HOST")
    assert items["redis.url"] == ("redis://me:***@localhost/0", "LIMITER_REDIS__URL")
    assert items["backends.gemini.api_key"] == ("***", "limiter.toml")
    assert items["redis.prefix"] == ("credits", "default")
    table = limiter("config", cwd=tmp_path, settings=settings | {"COLUMNS": "80"}).stdout
    assert "very-secret" not in table
    assert "hush" not in table
    assert {line.split()[0] for line in table.splitlines()} >= set(items)  # none is cut off


def test_unknown_setting_is_one_line_that_names_the_nearest(tmp_path: Path) -> None:
    answer = limiter("config", cwd=tmp_path, settings={"LIMITER_RELAY__PROT": "1"})
    assert answer.returncode == 1
    assert answer.stderr.startswith("limiter: relay.prot is not a setting; did you mean relay.port?")
    assert len(answer.stderr.splitlines()) == 1


@pytest.mark.slow
def test_lua_show_and_sha_match_what_redis_receives(tmp_path: Path) -> None:
    lines = limiter("lua", "names", cwd=tmp_path).stdout.splitlines()
    assert [line.split()[0] for line in lines] == script_names()
    summaries = json.loads(limiter("lua", "names", "--json", cwd=tmp_path).stdout)
    assert [tuple(line.split(maxsplit=1)) for line in lines] == list(summaries.items())
    assert summaries["release"] == "Releases a hold: its credits are free again."
    assert limiter("lua", "show", "reserve", cwd=tmp_path).stdout == compose("reserve").text
    shas = json.loads(limiter("lua", "sha", "--json", cwd=tmp_path).stdout)
    assert shas == {name: compose(name).sha for name in script_names()}
    unknown = limiter("lua", "show", "nothing", cwd=tmp_path)
    assert unknown.returncode == 1
    assert "balance, commit, create_rows" in unknown.stderr


@pytest.mark.slow
def test_licence_from_keygen_to_show(tmp_path: Path) -> None:
    made = limiter("licence", "keygen", cwd=tmp_path)
    key = tmp_path / "licence-key.pem"
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    (tmp_path / "limiter.toml").write_text(made.stdout[made.stdout.index("[licence]") :])

    again = limiter("licence", "keygen", cwd=tmp_path)
    assert (again.returncode, "exists already" in again.stderr) == (1, True)

    issued = limiter("licence", "issue", "--tier", "pro", "--sub", "alice", "--installs", "3", cwd=tmp_path)
    shown = limiter("licence", "show", issued.stdout.strip(), "--json", cwd=tmp_path)
    document = json.loads(shown.stdout)
    assert (document["tier"], document["sub"], document["installs"]) == ("pro", "alice", 3)
    assert (document["expired"], document["known_tier"]) == (False, True)

    for given, installs in (([], 1), (["--installs", "any"], None)):
        issued = limiter("licence", "issue", "--tier", "pro", "--sub", "alice", *given, cwd=tmp_path)
        document = json.loads(limiter("licence", "show", issued.stdout.strip(), "--json", cwd=tmp_path).stdout)
        assert document["installs"] == installs
        assert document["id"] in issued.stderr
    for number in ("0", "-1", "1.5", "many", ""):
        refused = limiter("licence", "issue", "--tier", "pro", "--sub", "alice", "--installs", number, cwd=tmp_path)
        assert (refused.returncode, refused.stdout) == (2, "")

    unnamed = limiter("licence", "issue", "--tier", "pro", "--sub", " ", cwd=tmp_path)
    assert (unnamed.returncode, unnamed.stdout) == (2, "")
    assert "--sub must not be empty" in unnamed.stderr
    unknown = limiter("licence", "issue", "--tier", "gold", "--sub", "alice", cwd=tmp_path)
    assert (unknown.returncode, "unknown tier 'gold'" in unknown.stderr) == (1, True)
    broken = limiter("licence", "show", issued.stdout.strip()[:-4] + "AAAA", cwd=tmp_path)
    assert (broken.returncode, "not valid" in broken.stderr) == (1, True)


async def test_row_shows_row_balances_and_live_holds(
    redis: Redis, redis_url: str, limiter_of_now: CreditLimiter, tmp_path: Path
) -> None:
    assert await redis.ping()
    held = await limiter_of_now.reserve(INSTALL, tier="core", has_hardware=True)
    await limiter_of_now.debit(INSTALL, tier="pro", has_hardware=True, cost=7)
    answer = limiter("row", INSTALL.upper(), "--redis", redis_url, "--json", cwd=tmp_path)
    document = json.loads(answer.stdout)
    assert document["row"]["monthly_consumed"] == 7
    assert document["balances"]["core"] == {
        "capped": "lifetime",
        "remaining": 50,
        "gemini_remaining": 20,
        "held": 1,
        "renews_at": None,
    }
    assert document["balances"]["pro"]["remaining"] == 993
    assert [hold["hold_id"] for hold in document["holds"]] == [held.hold_id]
    text = limiter("row", INSTALL, "--redis", redis_url, cwd=tmp_path).stdout
    assert f"hold {held.hold_id}: 1 of core on gemini, expires in " in text
    assert "993 of 1000" in text


def test_row_of_an_unknown_install_exits_1(redis_url: str, tmp_path: Path) -> None:
    answer = limiter("row", "nobody", "--redis", redis_url, cwd=tmp_path)
    assert answer.returncode == 1
    assert answer.stderr == "limiter: there is no row credits:install:nobody\n"


@pytest.fixture
def limiter_of_now(redis: Redis) -> CreditLimiter:

    return CreditLimiter(redis, TIERS)
