"""The settings of a backend: an invalid one is reported before the first request, without quoting a secret."""

import asyncio
import gc
import ssl
from contextlib import suppress
from pathlib import Path

import pytest

from limiter.config.loader import load_settings
from limiter.errors import SettingsError
from limiter.relay.process.relay_process import open_backends
from limiter.relay.upstream.client import BackendClient
from limiter.relay.upstream.response import BackendFailed
from tests.support.certificates import write_certificate
from tests.support.openai_backend import Backend


@pytest.mark.parametrize(
    "url", ["", "localhost:8000", "ftp://host/v1", "http://", "http://[::1", "//host", "http://h:x"]
)
async def test_backend_when_its_url_is_not_valid_then_settings_error(url: str) -> None:
    with pytest.raises(SettingsError, match=r"^backends\.hardware\.url is not an http:// or https:// URL$"):
        BackendClient("hardware", url, timeout_s=1)


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


async def test_backend_when_its_certificate_is_trusted_then_it_is_called_and_otherwise_it_sees_nothing(
    tmp_path: Path,
) -> None:
    key, certificate = write_certificate(tmp_path)
    heads: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for _ in range(2):
            heads.append(await reader.readuntil(b"\r\n\r\n"))
            await reader.readexactly(2)
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")
        writer.close()

    own = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    own.load_cert_chain(certificate, key)
    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=own)
    port = server.sockets[0].getsockname()[1]
    client = BackendClient("gemini", f"https://127.0.0.1:{port}/v1", timeout_s=5, api_key="key")
    with pytest.raises(BackendFailed, match="cannot be reached"):
        await client.send("embeddings", {}, b"{}")
    assert heads == []
    await client.aclose()
    client = BackendClient(
        "gemini", f"https://127.0.0.1:{port}/v1", timeout_s=5, api_key="key", ca_file=str(certificate)
    )
    for _ in range(2):
        with await client.send("embeddings", {}, b"{}") as upstream:
            assert (upstream.status, upstream.begun) == (200, b"{}")
    assert len(heads) == 2
    assert heads[0].startswith(b"POST /v1/embeddings HTTP/1.1\r\nHost: 127.0.0.1:%d\r\n" % port)
    await client.aclose()
    server.close()


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
                await client.send("embeddings", {}, b'{"model": "hang"}')
        with pytest.raises(BackendFailed, match="is not called for now") as raised:
            await client.send("embeddings", {}, b'{"model": "m"}')
        assert raised.value.problem.retry_after_s in (76, 77)


async def test_backends_when_none_is_set_then_the_echo_answers_as_both() -> None:
    async with open_backends(load_settings(None, {})[0]) as clients:
        assert {name: client.label for name, client in clients.items()} == {"gemini": "echo", "hardware": "echo"}
        with await clients["gemini"].send("embeddings", {}, b'{"model": "m", "input": "text"}') as upstream:
            assert upstream.status == 200
