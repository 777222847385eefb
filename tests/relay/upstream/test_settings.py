"""The settings of a backend: an invalid one is reported before the first request, without quoting a secret."""

import asyncio
import gc
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, nullcontext, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from limiter.config.loader import load_settings
from limiter.errors import SettingsError
from limiter.relay.process.relay_process import open_backends
from limiter.relay.telemetry.metrics import METRICS
from limiter.relay.upstream.circuit_breaker import CircuitBreaker
from limiter.relay.upstream.client import BackendClient
from limiter.relay.upstream.response import BackendFailed
from tests.support.certificates import write_certificate
from tests.support.openai_backend import Backend
from tests.support.raw_backend import GOOD, Peer, RawBackend, good, raw_backend
from tests.support.relay import ONE_SERVER, StartRelay, client_of
from tests.support.wait import eventually


@pytest.mark.parametrize(
    "url", ["", "localhost:8000", "ftp://host/v1", "http://", "http://[::1", "//host", "http://h:x"]
)
async def test_backend_when_its_url_is_not_valid_then_settings_error(url: str) -> None:
    with pytest.raises(SettingsError, match=r"^backends\.hardware\.url is not an http:// or https:// URL$"):
        BackendClient("hardware", url, timeout_s=1)


@pytest.mark.parametrize(
    ("url", "word"),
    [
        ("http://host/v1#x", "fragment"),
        ("http://host/v1#", "fragment"),
        ("http://host/v1?a=b#x", "fragment"),
        ("http://host/v1 ", "blank"),
        ("http://host/v1?a=b c", "blank"),
        ("http://host/v1\u00a0", "blank"),
        ("http://host/v1\u200b", "blank"),
        ("http://host/v1?key=secret ", "blank"),
    ],
)
async def test_backend_when_its_url_has_what_is_never_sent_then_settings_error_without_it(url: str, word: str) -> None:
    with pytest.raises(SettingsError, match=rf"^backends\.hardware\.url has a {word}") as raised:
        BackendClient("hardware", url, timeout_s=1)
    assert "secret" not in str(raised.value)


@pytest.mark.parametrize(
    ("end", "sent"),
    [
        ("", ""),
        ("/", ""),
        ("//", ""),
        ("?", ""),
        ("?api-version=2025-04-01-preview", "?api-version=2025-04-01-preview"),
        ("/?key=a&x=1", "?key=a&x=1"),
        ("?sig=a%2Bb%26c+d%20e&x", "?sig=a%2Bb%26c+d%20e&x"),
        ("?to=/v2/", "?to=/v2/"),
    ],
)
@pytest.mark.parametrize("path", ["chat/completions", "embeddings", "audio/transcriptions", "models"])
async def test_backend_when_its_url_has_a_query_then_it_is_sent_with_each_path_and_not_shown(
    end: str, sent: str, path: str
) -> None:
    heads: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heads.append(await reader.readuntil(b"\r\n\r\n"))
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\n{}")
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/openai/v1"
    client = BackendClient("hardware", url + end, timeout_s=5)
    with await client.send(path, {}, b"{}") as upstream:
        assert upstream.status == 200
    assert heads[0].split()[1].decode() == f"/openai/v1/{path}{sent}"
    assert client.label == url
    await client.aclose()
    server.close()


@pytest.mark.parametrize("key", ["a\nb", "key\n", "schlüssel", "a\0"])
async def test_backend_when_its_key_cannot_be_a_header_then_settings_error_without_the_key(key: str) -> None:
    with pytest.raises(SettingsError, match=r"^backends\.gemini\.api_key has a character") as raised:
        BackendClient("gemini", "http://host/v1", timeout_s=1, api_key=key)
    assert key not in str(raised.value)


async def test_backend_when_its_url_has_a_password_then_it_is_used_and_never_shown(hardware: Backend) -> None:
    client = BackendClient("hardware", hardware.url.replace("://", "://user:pass-word@"), timeout_s=5)
    with await client.send("embeddings", {}, b'{"model": "m"}') as upstream:
        assert upstream.status == 200
    assert hardware.last.headers["Authorization"] == "Basic dXNlcjpwYXNzLXdvcmQ="
    assert client.label == hardware.url
    await client.aclose()


async def test_body_when_it_always_has_more_then_it_still_ends_at_its_total_time() -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"{}")
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        with suppress(ConnectionError):
            while True:
                writer.write(b"4\r\nmore\r\n")
                await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
    client = BackendClient("gemini", url, timeout_s=5, total_s=0.3)

    async def read_all() -> None:
        with await client.send("embeddings", {}, b"{}") as upstream:
            while await upstream.read():
                await asyncio.sleep(0)

    with pytest.raises(BackendFailed, match="did not answer in time"):
        await read_all()
    await client.aclose()
    server.close()


async def test_backend_when_it_has_a_password_and_a_key_then_settings_error() -> None:
    with pytest.raises(SettingsError, match="set one of them only") as raised:
        BackendClient("hardware", "http://user:pass-word@host/v1", timeout_s=1, api_key="key")
    assert "pass-word" not in str(raised.value)


@pytest.mark.parametrize("user", ["a%3Ab:secret", "user:se%E2%82%ACcret"])
async def test_backend_when_its_urls_user_cannot_be_a_header_then_settings_error_without_it(user: str) -> None:
    with pytest.raises(
        SettingsError, match=r"^backends\.hardware\.url has a user or a password that a header"
    ) as raised:
        BackendClient("hardware", f"http://{user}@host/v1", timeout_s=1)
    assert "cret" not in str(raised.value)


# TLS


@asynccontextmanager
async def tls_backend(certificate: tuple[Path, Path]) -> AsyncIterator[RawBackend]:
    key, chain = certificate
    own = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    own.load_cert_chain(chain, key)
    async with raw_backend(good, tls=own) as backend:
        yield backend


def tls_client(port: int, ca_file: Path | str = "", **options: Any) -> BackendClient:
    url = f"https://127.0.0.1:{port}/v1"
    return BackendClient("gemini", url, timeout_s=5, api_key="key", ca_file=str(ca_file), **options)


async def test_tls_when_the_certificate_is_good_then_the_backend_is_asked_on_one_connection(tmp_path: Path) -> None:
    certificate = write_certificate(tmp_path)
    async with tls_backend(certificate) as backend:
        client = tls_client(backend.port, certificate[1])
        for _ in range(3):
            with await client.send("embeddings", {}, b"{}") as upstream:
                assert (upstream.status, upstream.begun, await upstream.read()) == (200, b"good", b"")
        assert [len(peer.requests) for peer in backend.peers] == [3]
        host = b"POST /v1/embeddings HTTP/1.1\r\nHost: 127.0.0.1:%d\r\n" % backend.port
        assert backend.peers[0].requests[0][0].startswith(host)
        assert client.connections == 1
        await client.aclose()


@pytest.mark.parametrize("kind", ["unknown", "expired", "wrong host"])
async def test_tls_when_the_certificate_is_bad_then_the_backend_sees_nothing(tmp_path: Path, kind: str) -> None:
    address = "127.0.0.2" if kind == "wrong host" else "127.0.0.1"
    ends_in = timedelta(days=-1 if kind == "expired" else 1)
    certificate = write_certificate(tmp_path, address=address, ends_in=ends_in)
    async with tls_backend(certificate) as backend:
        client = tls_client(backend.port, "" if kind == "unknown" else certificate[1])
        with pytest.raises(BackendFailed, match="cannot be reached"):
            await client.send("embeddings", {}, b"{}")
        assert not backend.requests
        assert client.connections == 0
        await client.aclose()


async def test_tls_when_the_backend_closes_an_idle_connection_then_it_is_forgotten_and_the_next_is_new(
    tmp_path: Path,
) -> None:
    certificate = write_certificate(tmp_path)
    key, chain = certificate
    own = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    own.load_cert_chain(chain, key)

    async def serve_one(peer: Peer) -> None:
        await peer.request()
        await peer.send(GOOD)

    async with raw_backend(serve_one, tls=own) as backend:
        client = tls_client(backend.port, chain, keepalive_s=60)
        for number in (1, 2):
            with await client.send("embeddings", {}, b"{}") as upstream:
                assert (upstream.begun, await upstream.read()) == (b"good", b"")
            await eventually(lambda: client.connections == 0)
            assert len(backend.peers) == number
        await client.aclose()


async def test_tls_when_a_body_ends_with_the_connection_then_it_is_read_whole(tmp_path: Path) -> None:
    certificate = write_certificate(tmp_path)
    key, chain = certificate
    own = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    own.load_cert_chain(chain, key)

    async def serve_one(peer: Peer) -> None:
        await peer.request()
        await peer.send(b"HTTP/1.1 200 OK\r\n\r\n" + b"x" * 500_000)

    async with raw_backend(serve_one, tls=own) as backend:
        client = tls_client(backend.port, chain)
        with await client.send("embeddings", {}, b"{}") as upstream:
            read = upstream.begun
            while part := await upstream.read():
                read += part
        assert read == b"x" * 500_000
        await client.aclose()


async def test_tls_when_the_backend_speaks_none_then_it_cannot_be_reached() -> None:
    async def serve(peer: Peer) -> None:
        await peer.reader.read(1)
        await peer.send(b"HTTP/1.1 400 Bad Request\r\n\r\n")

    async with raw_backend(serve) as backend:
        client = tls_client(backend.port)
        with pytest.raises(BackendFailed, match="cannot be reached"):
            await client.send("embeddings", {}, b"{}")
        await client.aclose()


@pytest.mark.parametrize("text", [None, "no certificate"])
async def test_ca_file_when_it_cannot_be_used_then_settings_error(tmp_path: Path, text: str | None) -> None:
    file = tmp_path / "ca.pem"
    if text is not None:
        file.write_text(text)
    with pytest.raises(SettingsError, match=r"^backends\.gemini\.ca_file (holds no|cannot be read)"):
        tls_client(443, file)


# Proxies


@pytest.mark.parametrize(
    ("url", "variables", "is_refused"),
    [
        ("https://api.example/v1", {"HTTPS_PROXY": "http://proxy:3128"}, True),
        ("https://api.example/v1", {"https_proxy": "http://proxy:3128"}, True),
        ("https://api.example/v1", {"ALL_PROXY": "socks5://proxy"}, True),
        ("http://api.example/v1", {"HTTP_PROXY": "http://proxy:3128"}, True),
        ("https://api.example/v1", {"HTTP_PROXY": "http://proxy:3128"}, False),
        ("https://api.example/v1", {"HTTPS_PROXY": ""}, False),
        ("https://api.example/v1", {"HTTPS_PROXY": "http://proxy:3128", "NO_PROXY": "a.b,.example"}, False),
        ("https://api.example/v1", {"HTTPS_PROXY": "http://proxy:3128", "NO_PROXY": "other.example"}, True),
        ("https://api.example/v1", {"HTTPS_PROXY": "http://proxy:3128", "NO_PROXY": "*"}, False),
        ("http://localhost:8000/v1", {"HTTP_PROXY": "http://proxy:3128"}, False),
        ("http://[::1]:8000/v1", {"ALL_PROXY": "http://proxy:3128"}, False),
    ],
)
async def test_proxy_when_the_environment_names_one_that_would_apply_then_settings_error(
    monkeypatch: pytest.MonkeyPatch, url: str, variables: dict[str, str], *, is_refused: bool
) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    settings, _ = load_settings(None, {"backends": {"hardware": {"url": url}}})
    with pytest.raises(SettingsError, match="is not supported: unset it") if is_refused else nullcontext():
        async with open_backends(settings):
            pass


# Bounds


@ONE_SERVER
async def test_connections_when_gemini_has_none_free_then_hardware_serves_and_the_breaker_stays_closed(
    start_relay: StartRelay, gemini: Backend, hardware: Backend
) -> None:
    breaker = CircuitBreaker(failures=1, reset_s=10)
    relay = await start_relay(
        client_of("gemini", gemini.url, max_connections=1, breaker=breaker), client_of("hardware", hardware.url)
    )
    waiting = asyncio.create_task(relay.ask("wait"))
    await gemini.arrived.wait()
    answer = await relay.ask()
    assert (answer.status, answer.headers["X-Credits-Backend"]) == (200, "hardware")
    assert breaker.state == "closed"
    gemini.go_on.set()
    assert (await waiting).headers["X-Credits-Backend"] == "gemini"
    assert await relay.spent() == (2, 1)


@ONE_SERVER
async def test_connections_when_the_only_backend_has_none_free_then_503_and_nothing_is_debited(
    start_relay: StartRelay, hardware: Backend
) -> None:
    breaker = CircuitBreaker(failures=1, reset_s=10)
    relay = await start_relay(client_of("hardware", hardware.url, max_connections=1, breaker=breaker))
    waiting = asyncio.create_task(relay.ask("wait"))
    await hardware.arrived.wait()
    answer = await relay.ask()
    assert (answer.status, answer.code, answer.headers["Retry-After"]) == (503, "relay_busy", "1")
    assert breaker.state == "closed"
    page = relay.app[METRICS].render().decode()
    assert 'limiter_backend_calls_total{backend="hardware",outcome="busy"} 1.0' in page
    assert 'limiter_backend_connections{backend="hardware"} 1.0' in page
    hardware.go_on.set()
    assert (await waiting).status == 200
    assert (await relay.ask()).status == 200
    assert await relay.spent() == (2, 0)


@ONE_SERVER
@pytest.mark.parametrize(
    "headers", [b"X: " + b"x" * (70 << 10) + b"\r\n", b"X: x\r\n" * 300], ids=["64 KiB", "256 headers"]
)
async def test_headers_when_a_backend_sends_too_many_then_the_error_and_the_log_say_so_and_the_breaker_stays_closed(
    start_relay: StartRelay, headers: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    async def serve(peer: Peer) -> None:
        await peer.request()
        await peer.send(b"HTTP/1.1 200 OK\r\n" + headers + b"Content-Length: 2\r\n\r\n{}")

    breaker = CircuitBreaker(failures=1, reset_s=10)
    async with raw_backend(serve) as backend:
        url = f"http://127.0.0.1:{backend.port}/v1"
        relay = await start_relay(client_of("hardware", url, breaker=breaker))
        for _ in range(2):
            answer = await relay.ask()
            assert (answer.status, answer.code) == (502, "backend_unavailable")
            assert "sent headers that cannot be read" in answer.document["detail"]
    assert "sent headers that cannot be read" in caplog.text
    assert breaker.state == "closed"


# Backends


async def test_backends_when_one_is_refused_then_the_other_is_closed() -> None:
    settings = load_settings(None, {"backends": {"gemini": {"api_key": "key"}, "hardware": {"url": "localhost:8000"}}})
    with pytest.raises(SettingsError, match=r"^backends\.hardware\.url "):
        async with open_backends(settings[0]):
            pass
    gc.collect()  # a session that was left open would warn now


async def test_backends_when_their_settings_say_so_then_they_have_timeouts_breakers_and_names(
    hardware: Backend,
) -> None:
    own = {"timeout_s": 0.2, "breaker_failures": 2, "breaker_reset_s": 77}
    named = {"recap": {"hardware": "hang"}}
    settings, _ = load_settings(None, {"backends": {"hardware": {"url": hardware.url, **own}}, "models": named})
    async with open_backends(settings) as clients:
        client = clients["hardware"]
        assert client.model("recap") == "hang"
        for _ in range(2):
            with pytest.raises(BackendFailed, match="in time"):
                await client.send("embeddings", {}, b'{"model": "hang"}', install_id="one")
        with pytest.raises(BackendFailed, match="is not called for now") as raised:
            await client.send("embeddings", {}, b'{"model": "m"}', install_id="one")
        assert raised.value.problem.retry_after_s in (76, 77)


async def test_backends_when_none_is_set_then_the_echo_answers_as_both() -> None:
    async with open_backends(load_settings(None, {})[0]) as clients:
        assert {name: client.label for name, client in clients.items()} == {"gemini": "echo", "hardware": "echo"}
        with await clients["gemini"].send("embeddings", {}, b'{"model": "m", "input": "text"}') as upstream:
            assert upstream.status == 200
