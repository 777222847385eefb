"""`limiter doctor`, and the Redis user that it prints: with exactly these rights all of limiter runs."""

import json
import resource
import shlex
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from pydantic import BaseModel, SecretStr
from redis.asyncio import Redis

from limiter import CreditLimiter, Execution, LimiterUnavailable, SettingsError, connect
from limiter.backup.dump import dump
from limiter.backup.importer import import_file
from limiter.backup.persister import Persister
from limiter.config.settings import (
    BackendsSettings,
    GeminiSettings,
    HardwareSettings,
    LicenceSettings,
    PersisterSettings,
    RedisSettings,
    RelaySettings,
    Settings,
)
from limiter.doctor import _models, _open_files, examine
from limiter.licences.keys import issue
from limiter.licences.seats import Seats
from limiter.licences.tokens import public_key_text
from limiter.redis.acl import acl_line, needed_commands, probes
from limiter.redis.replication import wait_for_replicas
from limiter.redis.server_checks import Finding
from limiter.redis.url import Kind
from limiter.relay.metering.install_rate_limit import InstallRateLimit, MintStatus
from tests.support.cli import limiter
from tests.support.credits import TIERS
from tests.support.openai_backend import running_backend
from tests.support.redis_servers import Server, binaries, free_port
from tests.support.redis_topologies import ClusterSetUp, SentinelSetUp, execute
from tests.support.relay import client_of, relays_on
from tests.support.wait import eventually

MakeServer = Callable[..., Server]
LICENCE_KEY = Ed25519PrivateKey.generate()
INSTALL = "0a0f3b4e-6a3e-4f0e-8f54-2f6a3f6f0b11"
SERVERS = pytest.mark.parametrize("binary", ["valkey", "redis"])


def user_on(server: Server, line: str) -> str:
    """Create the user that a line describes, with a password; return the URL to come as that user."""
    execute(server, *shlex.split(line.replace("PASSWORD", "secret")))
    return server.url.replace("redis://", "redis://limiter:secret@")


def denied(server: Server) -> list[str]:
    """Return what the server has refused to any user."""
    return [entry["object"] for entry in execute(server, "ACL", "LOG")]


def used(server: Server) -> set[str]:
    """Return the commands that were run, also inside scripts."""
    return {name.removeprefix("cmdstat_") for name in execute(server, "INFO", "commandstats")}


@SERVERS
async def test_user_of_the_line_when_all_of_limiter_runs_then_nothing_is_refused_and_each_right_is_used(
    own_server: MakeServer, closing: AsyncExitStack, tmp_path: Path, binary: str
) -> None:
    server = own_server(binary)
    needed = needed_commands("single")
    url = user_on(server, acl_line("credits", needed))
    execute(server, "CONFIG", "RESETSTAT")
    redis = await connect(url)
    closing.push_async_callback(redis.aclose)
    limiter = CreditLimiter(redis, TIERS)
    await serve_a_little(await connected(server.url, closing), limiter, closing)
    seats, new_installs = Seats(limiter.session), InstallRateLimit(limiter.session)
    assert await seats.list("alice")
    assert await seats.free("alice", INSTALL)
    assert (await new_installs.mint({"network": 1}, period_ms=1000)).status is MintStatus.MINTED

    execute(server, "SET", "credits:install:broken", "no hash")  # one that cannot be read is taken along as it is
    async with Persister(limiter.session, tmp_path / "credits.json", interval_s=60):
        await eventually((tmp_path / "credits.json").exists, what="a dump")
    assert (tmp_path / "credits.json.broken.json").exists()
    execute(server, "DEL", "credits:install:broken")
    await import_file(limiter.session, tmp_path / "credits.json", mode="merge")
    assert denied(server) == []
    assert set(needed) == used(server) & set(needed), "a right that nothing uses"


async def connected(url: str, closing: AsyncExitStack) -> "Redis":
    redis = await connect(url)
    closing.push_async_callback(redis.aclose)
    return redis


async def serve_a_little(admin: "Redis", limiter: CreditLimiter, closing: AsyncExitStack) -> None:
    """Run a relay with licences, seats, keys and new installs, on the limiter's user."""
    backend = await closing.enter_async_context(running_backend())
    start = await closing.enter_async_context(relays_on(admin))
    relay = await start(
        client_of("gemini", backend.url),
        on=limiter,
        public_keys=[public_key_text(LICENCE_KEY.public_key())],
        mint_per_ip=5,
        mint_overall=5,
    )
    licence = issue(LICENCE_KEY, tier="pro", subject="alice", valid_s=1000, installs=2)
    login = {"Authorization": f"Bearer {licence}", "X-Install-Id": INSTALL}
    for headers in ({"Idempotency-Key": "k"}, {"Idempotency-Key": "k"}, {"x-stainless-retry-count": "0"}, {}):
        assert (await relay.ask(headers=login | headers)).status == 200
    assert (await relay.ask("refused")).status == 200
    for path in ("/v1/credits", "/readyz"):
        assert (await relay.send("GET", path, None, **login)).status == 200
    await relay.settled()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sentinel", "cluster"])
async def test_user_of_the_printed_line_when_there_are_several_servers_then_nothing_is_refused_either(
    tmp_path: Path, closing: AsyncExitStack, kind: str
) -> None:
    binary = binaries()["valkey"]
    assert binary
    servers: SentinelSetUp | ClusterSetUp
    servers = SentinelSetUp(binary, tmp_path) if kind == "sentinel" else ClusterSetUp(binary, tmp_path, replicas=0)
    closing.callback(servers.kill)
    servers.start()
    line = acl_line("credits", needed_commands("sentinel" if kind == "sentinel" else "cluster"))
    for server in servers.servers:
        user_on(server, line)
    redis = await connect(servers.url.replace("://", "://limiter:secret@"))
    closing.push_async_callback(redis.aclose)
    credit_limiter = CreditLimiter(redis, TIERS)
    for number in range(10):
        assert (await credit_limiter.debit(f"i-{number}", tier="pro", has_hardware=True)).allowed
    assert (await dump(credit_limiter.session, tmp_path / "credits.json")).rows == 10
    if kind == "sentinel":  # the cluster has no replicas
        async with wait_for_replicas(redis, 2):
            await credit_limiter.debit("i-0", tier="pro", has_hardware=True)
    assert [denied(server) for server in servers.servers] == [[]] * len(servers.servers)


@SERVERS
async def test_doctor_when_rights_are_missing_then_it_names_those(own_server: MakeServer, binary: str) -> None:
    server = own_server(binary)
    needed = needed_commands("single")
    untried = {"client|setname", "info"}  # without these there is no connection, or nothing to report
    for missing in ({"hset"}, {"evalsha", "script|load"}, set(needed) - untried):
        url = user_on(server, acl_line("credits", [command for command in needed if command not in missing]))
        (problem,) = (finding for finding in await found(url) if finding.level == "problem")
        words = problem.text.removeprefix("this user may not run ").split(", ")
        assert sorted(words) == sorted(command.replace("|", " ").upper() for command in missing)
    assert execute(server, "KEYS", "*") in ([], ["credits:doctor"])
    url = user_on(server, acl_line("other", needed))
    assert "this user may not touch the keys credits:*" in {finding.text for finding in await found(url)}
    url = user_on(server, acl_line("credits", [command for command in needed if command != "client|setname"]))
    (problem,) = (finding for finding in await found(url) if finding.level == "problem")
    assert "may not connect" in problem.text
    assert "'client|setname'" in problem.text


@SERVERS
async def test_calls_when_a_permission_is_revoked_then_the_error_names_it_and_says_where_the_line_is(
    own_server: MakeServer, closing: AsyncExitStack, binary: str
) -> None:
    server = own_server(binary)
    needed = needed_commands("single")
    redis = await connect(user_on(server, acl_line("credits", needed)))
    closing.push_async_callback(redis.aclose)
    credit_limiter = CreditLimiter(redis, TIERS, deadline_ms=1000)
    assert (await credit_limiter.debit("a", tier="pro", has_hardware=True)).allowed
    # Inside a script Redis 7.0 does not name it, and the doctor does.
    for command, named, execution in (
        ("hset", "ACL failure|can't run this", Execution.UNKNOWN),
        ("evalsha", "'evalsha'", Execution.NOT_EXECUTED),
    ):
        execute(server, "ACL", "SETUSER", "limiter", f"-{command}")
        with pytest.raises(LimiterUnavailable, match=f"({named}).*`limiter doctor`") as refused:
            await credit_limiter.debit("a", tier="pro", has_hardware=True)
        assert refused.value.execution in {execution, Execution.UNKNOWN}
    with pytest.raises(SettingsError, match=r"'client\|setname'.*`limiter doctor`"):
        await connect(user_on(server, "ACL SETUSER limiter reset on >PASSWORD ~credits:* +info"))


async def test_writes_when_there_are_too_few_replicas_then_it_is_unavailable_and_nothing_was_executed(
    own_server: MakeServer, closing: AsyncExitStack
) -> None:
    server = own_server()
    redis = await connect(server.url)
    closing.push_async_callback(redis.aclose)
    credit_limiter = CreditLimiter(redis, TIERS, deadline_ms=200)
    execute(server, "CONFIG", "SET", "min-replicas-to-write", "1")
    with pytest.raises(LimiterUnavailable, match="Redis cannot do this now: NOREPLICAS"):
        await credit_limiter.debit("a", tier="pro", has_hardware=True)
    execute(server, "CONFIG", "SET", "min-replicas-to-write", "0")
    assert await credit_limiter.row("a") is None


async def found(url: str, **sections: BaseModel) -> list[Finding]:
    """Examine this Redis, with no file of a ledger unless it is given."""
    given = {"redis": RedisSettings(url=url), "persister": PersisterSettings(file=""), **sections}
    return await examine(Settings.model_construct(**given))  # type: ignore[arg-type]  # without the environment


def worst(findings: list[Finding]) -> dict[str, str]:
    """Return what is not well: by subject, in its level's name, all in one text."""
    by_subject: dict[str, str] = {}
    for finding in findings:
        if finding.level != "ok":
            text = f"{finding.level} {finding.text}: {finding.advice}"
            by_subject[finding.subject] = f"{by_subject.get(finding.subject, '')}{text}\n"
    return by_subject


async def test_doctor_when_redis_is_set_up_badly_then_it_says_what_to_do(own_server: MakeServer) -> None:
    server = own_server("valkey", "--maxmemory", "600mb")
    assert worst(await found(server.url)) == {}
    execute(server, "CONFIG", "SET", "maxmemory", "500mb")
    assert "warning has a maxmemory of 500 MiB, of which" in worst(await found(server.url))["redis"]
    execute(server, "CONFIG", "SET", "maxmemory", "0")
    assert "warning has no maxmemory" in worst(await found(server.url))["redis"]
    execute(server, "CONFIG", "SET", "maxmemory-policy", "allkeys-lru")
    execute(server, "CONFIG", "SET", "maxmemory", "1mb")
    redis_findings = worst(await found(server.url))["redis"]
    assert "problem may evict rows (maxmemory-policy allkeys-lru): set it to noeviction" in redis_findings
    assert "CONFIG SET maxmemory-policy noeviction" in redis_findings
    assert "% of maxmemory; when it is full, requests are refused" in redis_findings
    accepted = RedisSettings(url=server.url, allow_eviction=True)
    assert "warning may evict rows" in worst(await found(server.url, redis=accepted))["redis"]
    waiting = RedisSettings(url=server.url, wait_replicas=1)
    assert "warning has 0 replicas, and redis.wait_replicas is 1" in worst(await found("", redis=waiting))["redis"]
    execute(server, "CONFIG", "SET", "maxmemory", "0")
    execute(server, "CONFIG", "SET", "maxmemory-policy", "noeviction")
    execute(server, "CONFIG", "SET", "appendfsync", "no")
    assert "CONFIG SET appendfsync everysec" in worst(await found(server.url))["redis"]
    execute(server, "CONFIG", "SET", "appendonly", "no")
    assert "warning runs without AOF" in worst(await found(server.url))["redis"]
    server.kill()
    place = server.url.removeprefix("redis://")
    assert f"problem redis://:***@{place}: " in worst(await found(f"redis://:hidden@{place}"))["redis"]
    assert "is not a valid Redis URL" in worst(await found("http://hidden"))["redis"]


@pytest.mark.parametrize("command", ["SCRIPT", "EVALSHA", "TIME"])
async def test_doctor_when_the_server_lacks_a_command_then_it_is_named(own_server: MakeServer, command: str) -> None:
    server = own_server("valkey", "--rename-command", command, "")
    told_of = worst(await found(server.url))["redis"]
    assert f"problem has no {command}" in told_of
    assert f"take `rename-command {command} " in told_of


async def test_doctor_when_settings_lead_nowhere_then_each_is_named(own_server: MakeServer, tmp_path: Path) -> None:
    url = own_server().url
    (tmp_path / "credits.json").write_text("{")
    unreachable = HardwareSettings(url=f"http://127.0.0.1:{free_port()}/v1")
    by_subject = worst(
        await found(
            url,
            licence=LicenceSettings(public_keys=["ed25519:x"]),
            persister=PersisterSettings(file=str(tmp_path / "credits.json")),
            backends=BackendsSettings(hardware=unreachable),
        )
    )
    assert "problem " in by_subject["licence"]
    assert "credits.json" in by_subject["persister"]
    assert "cannot be reached" in by_subject["backends.hardware"]
    nowhere = PersisterSettings(file="/proc/nothing/credits.json")
    assert "/proc cannot be written" in worst(await found(url, persister=nowhere))["persister"]


async def test_doctor_when_a_backend_refuses_the_key_or_has_no_models_then_it_says_so(own_server: MakeServer) -> None:
    async with running_backend() as backend:
        url = own_server().url
        for path, key, level in (("", "", "ok"), ("/nowhere", "", "warning")):
            hardware = HardwareSettings(url=backend.url + path, api_key=SecretStr(key))
            findings = await found(url, backends=BackendsSettings(hardware=hardware))
            assert next(each.level for each in findings if each.subject == "backends.hardware") == level


def test_open_files_when_the_bounds_of_connections_need_more_then_the_doctor_says_so() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard == resource.RLIM_INFINITY or hard > 1_000_000:
        pytest.skip("this machine has no limit of open files")

    def looked_at(clients: int, backend: int) -> dict[str, str]:
        hardware = HardwareSettings(url="http://host/v1", max_connections=backend)
        settings = Settings.model_construct(
            relay=RelaySettings(max_connections=clients), backends=BackendsSettings(hardware=hardware)
        )
        return worst([*_open_files(settings)])

    assert looked_at(0, 0) == looked_at(0, 100) == looked_at(hard - 500, 100) == {}
    assert f"relay.max_connections is {hard - 500}, which needs up to" in looked_at(hard - 500, 0)["open files"]
    assert f"backends.hardware.max_connections is {hard}" in looked_at(100, hard)["open files"]


def test_models_when_gemini_is_set_and_any_is_served_then_the_doctor_recommends_a_list() -> None:
    with_key = BackendsSettings(gemini=GeminiSettings(api_key=SecretStr("k")))
    for backends, models, recommends in (
        (with_key, "any", True),
        (with_key, "listed", False),
        (BackendsSettings(), "any", False),
    ):
        relay = RelaySettings.model_validate({"models": models})
        found = worst([*_models(Settings.model_construct(relay=relay, backends=backends))])
        assert ("relay.models is any" in found.get("models", "")) == recommends


def test_probes_when_listed_then_there_is_one_for_each_right_but_select() -> None:
    kinds: tuple[Kind, ...] = ("single", "sentinel", "cluster")
    for kind in kinds:
        needed = needed_commands(kind, database=1)
        assert {command for command, _ in probes(needed, "k")} == set(needed) - {"select"}


def test_command_when_there_is_a_problem_then_it_exits_1_and_prints_the_line_for_this_url(tmp_path: Path) -> None:
    url = f"redis+cluster://:hidden@127.0.0.1:{free_port()}"
    answer = limiter("doctor", "--redis", url, "--json", cwd=tmp_path)
    assert answer.returncode == 1
    document = json.loads(answer.stdout)
    assert document["acl"] == acl_line("credits", needed_commands("cluster"))
    assert {"level", "subject", "text", "advice"} == set(document["findings"][0])
    assert "hidden" not in answer.stdout + answer.stderr


def test_command_when_the_server_is_embedded_then_there_is_no_user_to_create(tmp_path: Path) -> None:
    answer = limiter("doctor", "--redis", f"embedded:{tmp_path / 'data'}", cwd=tmp_path)
    assert answer.returncode == 0, answer.stdout
    assert "ACL SETUSER" not in answer.stdout
