"""`connect`: which servers it accepts, which it refuses and why, and that no error contains a password."""

import logging
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from limiter import CreditLimiter, Execution, LimiterUnavailable, SettingsError, connect
from limiter.redis.cluster import primaries_of
from limiter.redis.url import Address, parse_url, passwords_of, redacted
from tests.support.certificates import write_certificate
from tests.support.credits import TIERS
from tests.support.redis_servers import Server, binaries, free_port
from tests.support.redis_topologies import ClusterSetUp, SentinelServer, execute

MakeServer = Callable[..., Server]
SERVERS = pytest.mark.parametrize("binary", ["valkey", "redis"])


@pytest.mark.parametrize("url", ["", "localhost:6379", "http://localhost", "redis://localhost:port", "redis://[::1"])
async def test_url_when_it_is_not_valid_then_it_is_a_settings_error_that_shows_the_forms(url: str) -> None:
    with pytest.raises(SettingsError, match="is not a valid Redis URL: give redis://"):
        await connect(url)


@pytest.mark.parametrize(
    "url",
    [
        "redis+sentinel://h1:26379",
        "redis+sentinel://h1:26379/",
        "redis+sentinel://h1:26379/name/db",
        "redis+sentinel://h1:26379/name/0/1",
        "redis+sentinel://h1:port/name",
        "redis+sentinel://h1,,h2/name",
        "redis+cluster://",
        "redis+cluster://h1:7000,h2:70000",
        "redis+cluster://h1:7000/name",
        "redis+cluster://:sec/ret@h1:7000",
        "redis+other://h1",
    ],
)
async def test_url_of_several_servers_when_it_is_not_valid_then_the_error_has_no_password(
    url: str,
) -> None:
    with pytest.raises(SettingsError, match="is not a valid Redis URL: give redis://") as refused:
        await connect(url)
    assert "sec" not in str(refused.value)


def test_url_of_sentinels_when_read_then_each_server_has_a_url_of_its_own() -> None:
    topology = parse_url(
        "rediss+sentinel://me:pa%2Fss@h1,[::1]:5/my%20name/2?sentinel_password=s%26&ssl_ca_certs=/ca.pem"
    )
    assert topology is not None
    assert (topology.kind, topology.name, [str(seed) for seed in topology.seeds]) == (
        "sentinel",
        "my name",
        ["h1:26379", "[::1]:5"],
    )
    assert topology.url_of(Address("h3", 1)) == "rediss://me:pa%2Fss@h3:1/2?ssl_ca_certs=%2Fca.pem"
    assert topology.sentinel_url_of(topology.seeds[0]) == "rediss://:s%26@h1:26379/?ssl_ca_certs=%2Fca.pem"
    assert "pa%2Fss" not in repr(topology)


def test_url_of_a_cluster_when_read_then_without_ports_it_means_the_usual_one() -> None:
    topology = parse_url("redis+cluster://h1,h2:7001/")
    assert topology is not None
    assert topology.seeds == (Address("h1", 6379), Address("h2", 7001))
    assert topology.url_of(Address("h3", 7002)) == "redis://h3:7002/"


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://h:1/0", "redis://h:1/0"),
        ("redis://:secret@h:1/0", "redis://:***@h:1/0"),
        ("rediss://me:secret@h:1/0?db=2", "rediss://me:***@h:1/0?db=2"),
        ("redis://:sec/ret@h:1/0", "redis://:***@h:1/0"),
        ("redis://:sec@ret@h:1/0", "redis://:***@h:1/0"),
        ("unix:///run/redis.sock?password=secret&db=1", "unix:///run/redis.sock?password=***&db=1"),
        ("embedded:./data", "embedded:./data"),
        ("redis://:sec#ret?x@h:1/0", "redis://:***@h:1/0"),
        ("redis://h:1/0?password=se@cret", "redis://h:1/0?password=***"),
        ("redis://me:a@h:1/0?password=se@cr&et&db=1", "redis://me:***@h:1/0?password=***&db=1"),
        ("redis://h:1/0?password=se#cret", "redis://h:1/0?password=***"),
        ("http://h/v1?key=secret&x=1", "http://h/v1?key=***&x=1"),
        ("redis+sentinel://:a@h1,h2/n?sentinel_password=b", "redis+sentinel://:***@h1,h2/n?sentinel_password=***"),
    ],
)
def test_url_when_shown_then_without_its_password(url: str, shown: str) -> None:
    assert redacted(url) == shown


@pytest.mark.parametrize(
    "url",
    [
        f"{scheme}://{login}@127.0.0.1:1{end}"
        for scheme in ("redis", "rediss", "redis+cluster", "redis+sentinel")
        for login in (":7{}secret", "me:7{}secret", "me:sec@7{}secret", ":secret{}7@se/cret")
        for end in ("", "/0", "/mymaster/0?db=1")
    ],
)
@pytest.mark.parametrize("split", ["/", "?", "#", "/?", "?x=1&y#"])
async def test_connect_when_a_password_is_not_percent_encoded_then_the_error_says_so_and_shows_no_part_of_it(
    url: str, split: str
) -> None:
    with pytest.raises(SettingsError, match="percent-encoded") as raised:
        await connect(url.format(split))
    shown = str(raised.value).partition(" is not a valid")[0]
    assert "sec" not in shown
    assert "cret" not in shown
    assert ":7" not in shown
    assert raised.value.__cause__ is None


@pytest.mark.parametrize("url", ["redis://:sec/ret@127.0.0.1:1", "redis://:secret@127.0.0.1:1", "http://:secret@h"])
async def test_connect_when_it_fails_then_no_error_contains_the_password(url: str) -> None:
    with pytest.raises((SettingsError, LimiterUnavailable)) as failed:
        await connect(url)
    chain: BaseException | None = failed.value
    while chain and not failed.value.__suppress_context__:
        assert "sec" not in str(chain)
        chain = chain.__cause__
    assert "sec" not in str(failed.value)


async def test_connect_when_no_server_listens_then_it_is_unavailable_and_nothing_was_executed() -> None:
    with pytest.raises(LimiterUnavailable, match=r"no Redis at redis://127\.0\.0\.1:") as unavailable:
        await connect(f"redis://127.0.0.1:{free_port()}")
    assert unavailable.value.execution is Execution.NOT_EXECUTED


@SERVERS
async def test_password_when_right_then_it_works_and_when_wrong_or_missing_then_it_is_a_settings_error(
    own_server: MakeServer, closing: AsyncExitStack, binary: str
) -> None:
    server = own_server(binary)
    admin = await connect(server.url)
    closing.push_async_callback(admin.aclose)
    await admin.config_set("requirepass", "right")
    place = server.url.removeprefix("redis://")
    client = await connect(f"redis://:right@{place}")
    await client.aclose()
    for login in (":wrong@", "nobody:right@", ""):
        with pytest.raises(SettingsError, match="refuses this user or password"):
            await connect(f"redis://{login}{place}")


@SERVERS
async def test_server_when_it_may_evict_rows_then_it_is_refused_unless_that_is_accepted(
    own_server: MakeServer, closing: AsyncExitStack, binary: str
) -> None:
    server = own_server(binary, "--maxmemory-policy", "allkeys-lru")
    with pytest.raises(SettingsError, match=r"may evict rows \(maxmemory-policy allkeys-lru\): set it to noeviction"):
        await connect(server.url)
    client = await connect(server.url, allow_eviction=True)
    closing.push_async_callback(client.aclose)
    assert (await CreditLimiter(client, TIERS).debit("a", tier="core", has_hardware=False)).allowed


@SERVERS
async def test_server_when_it_runs_without_aof_then_there_is_a_warning_and_with_it_none(
    own_server: MakeServer, closing: AsyncExitStack, caplog: pytest.LogCaptureFixture, binary: str
) -> None:
    with caplog.at_level(logging.WARNING, logger="limiter"):
        for arguments in ([], ["--appendonly", "no"]):
            assert not caplog.messages
            client = await connect(own_server(binary, *arguments).url)
            closing.push_async_callback(client.aclose)
    assert [message.partition(" at ")[0] for message in caplog.messages] == ["Redis"]
    assert "runs without AOF" in caplog.text


async def test_server_when_it_is_busy_at_connect_then_it_is_unavailable_in_time(own_server: MakeServer) -> None:
    server = own_server()
    server.pause()
    with pytest.raises(LimiterUnavailable):
        await connect(server.url, timeout_ms=100)


@SERVERS
async def test_unix_socket_when_given_then_decisions_go_over_it(
    own_server: MakeServer, closing: AsyncExitStack, tmp_path: Path, binary: str
) -> None:
    path = tmp_path / "redis.sock"
    own_server(binary, "--unixsocket", str(path))
    client = await connect(f"unix://{path}")
    closing.push_async_callback(client.aclose)
    assert (await CreditLimiter(client, TIERS).debit("a", tier="core", has_hardware=False)).allowed


async def test_tls_when_the_certificate_is_trusted_then_decisions_go_over_it_and_otherwise_not(
    own_server: MakeServer, closing: AsyncExitStack, tmp_path: Path
) -> None:
    """Debian's Redis only: the wheel's Valkey is built without TLS."""
    key, certificate = write_certificate(tmp_path)
    port = free_port()
    own_server(
        "redis",
        *("--tls-port", str(port), "--tls-cert-file", str(certificate), "--tls-key-file", str(key)),
        *("--tls-ca-cert-file", str(certificate), "--tls-auth-clients", "no"),
    )
    with pytest.raises(LimiterUnavailable, match="certificate verify failed"):
        await connect(f"rediss://127.0.0.1:{port}/0")
    client = await connect(f"rediss://127.0.0.1:{port}/0?ssl_ca_certs={certificate}")
    closing.push_async_callback(client.aclose)
    assert (await CreditLimiter(client, TIERS).debit("a", tier="core", has_hardware=False)).allowed


@pytest.mark.parametrize(
    ("url", "passwords"),
    [
        ("redis://h", set()),
        ("redis://me@h", set()),
        ("redis://me:a%26b@h", {"a%26b", "a&b"}),
        ("redis+sentinel://:a@h1,h2/n?sentinel_password=b&x=1", {"a", "b"}),
        ("unix:///p?password=c", {"c"}),
    ],
)
def test_passwords_of_a_url_when_listed_then_all_of_them_in_each_spelling(url: str, passwords: set[str]) -> None:
    assert set(passwords_of(url)) == passwords


def tls_options(key: Path, certificate: Path) -> dict[str, str]:
    """Return the settings of a server that speaks TLS with clients that trust this certificate."""
    return {
        "tls-cert-file": str(certificate),
        "tls-key-file": str(key),
        "tls-ca-cert-file": str(certificate),
        "tls-auth-clients": "no",
    }


@pytest.mark.slow
async def test_tls_when_redis_is_a_cluster_then_each_node_is_connected_to_over_it(
    closing: AsyncExitStack, tmp_path: Path
) -> None:
    binary = binaries()["redis"]
    if binary is None:
        pytest.skip("Debian's redis-server is not installed (apt-get install redis-server)")
    key, certificate = write_certificate(tmp_path)
    options = tls_options(key, certificate) | {"tls-cluster": "yes"}
    words = (word for name, value in options.items() for word in (f"--{name}", value))
    cluster = ClusterSetUp(binary, tmp_path, *words, replicas=0)
    ports = [free_port() for _ in cluster.servers]
    for server, port in zip(cluster.servers, ports, strict=True):
        server.extra = ("--tls-port", str(port), *server.extra)
    closing.callback(cluster.kill)
    cluster.start()
    client = await connect(f"rediss+cluster://127.0.0.1:{ports[1]}?ssl_ca_certs={certificate}")
    closing.push_async_callback(client.aclose)
    for number in range(20):
        assert (await CreditLimiter(client, TIERS).debit(f"i-{number}", tier="core", has_hardware=False)).allowed
    nodes = await primaries_of(client)
    assert sorted(node.connection_pool.connection_kwargs["port"] for node in nodes) == sorted(ports)
    assert all(execute(server, "DBSIZE") for server in cluster.servers)


async def test_tls_when_there_are_sentinels_then_they_and_the_primary_are_connected_to_over_it(
    own_server: MakeServer, closing: AsyncExitStack, tmp_path: Path
) -> None:
    key, certificate = write_certificate(tmp_path)
    options, port = tls_options(key, certificate), free_port()
    words = (word for name, value in options.items() for word in (f"--{name}", value))
    primary = own_server("redis", "--tls-port", str(port), *words)
    sentinel_port = free_port()
    sentinel = SentinelServer(
        primary.binary,
        tmp_path / "sentinel",
        f"tls-port {sentinel_port}",
        "tls-replication yes",
        f"sentinel monitor mymaster 127.0.0.1 {port} 1",
        *(f"{name} {value}" for name, value in options.items()),
    )
    closing.callback(sentinel.kill)
    sentinel.start()
    client = await connect(f"rediss+sentinel://127.0.0.1:{sentinel_port}/mymaster?ssl_ca_certs={certificate}")
    closing.push_async_callback(client.aclose)
    assert (await CreditLimiter(client, TIERS).debit("a", tier="core", has_hardware=False)).allowed
    assert execute(primary, "DBSIZE") == 1
    with pytest.raises(LimiterUnavailable, match="certificate verify failed"):
        await connect(f"rediss+sentinel://127.0.0.1:{sentinel_port}/mymaster")


@pytest.mark.parametrize("command", ["SCRIPT", "EVALSHA"])
async def test_connect_when_a_server_lacks_a_command_that_decisions_need_then_the_error_names_it(
    own_server: Callable[..., Server], command: str
) -> None:
    server = own_server("valkey", "--rename-command", command, "")
    with pytest.raises(SettingsError, match=rf"has no {command} command, .*: take `rename-command {command} "):
        await connect(server.url)
