"""The connection that carries the decisions: order, one write a turn, cancelled and late calls, a broken server."""

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager

import pytest
import uvloop
from redis.asyncio import Connection
from redis.exceptions import NoScriptError, ResponseError

from limiter.errors import Execution, LimiterUnavailable, Overloaded
from limiter.redis.multiplexed import MultiplexedConnection, _Call
from limiter.redis.resp import encode
from tests.support.redis_servers import Server
from tests.support.wait import eventually

MakeServer = Callable[..., Server]
PLENTY_S = 20.0


async def connection_to(
    port: int, closing: AsyncExitStack, *, max_waiting: int = 8192, database: int = 0
) -> MultiplexedConnection:
    async def dial() -> Connection:
        connection = Connection(port=port, db=database, protocol=2, socket_timeout=0.5, socket_connect_timeout=0.5)
        await connection.connect()  # type: ignore[no-untyped-call]  # redis-py 8.1
        return connection

    channel = MultiplexedConnection(dial, max_waiting=max_waiting)
    closing.push_async_callback(channel.aclose)
    return channel


class Recorder:
    """A server that records what each read returned, and sends what the test writes."""

    def __init__(self) -> None:
        self.reads: list[bytes] = []
        self.writers: list[asyncio.StreamWriter] = []
        self.port = 0

    async def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.writers.append(writer)
        while data := await reader.read(1 << 20):
            if b"SETINFO" in data:
                writer.write(b"+OK\r\n" * data.count(b"SETINFO"))
            else:
                self.reads.append(data)


@asynccontextmanager
async def recording() -> AsyncIterator[Recorder]:
    recorder = Recorder()
    async with await asyncio.start_server(recorder.accept, "127.0.0.1", 0) as server:
        recorder.port = server.sockets[0].getsockname()[1]
        yield recorder
        for writer in recorder.writers:
            writer.close()


def echo(word: object) -> bytes:
    return encode("ECHO", str(word))


async def test_answers_when_many_calls_are_under_way_then_each_caller_has_its_own(
    own_server: MakeServer, closing: AsyncExitStack
) -> None:
    channel = await connection_to(own_server().port, closing)
    answers = await asyncio.gather(*(channel.send("", echo(number), PLENTY_S) for number in range(3000)))
    assert answers == [str(number).encode() for number in range(3000)]


async def test_calls_when_of_one_iteration_then_they_are_sent_as_one_write(closing: AsyncExitStack) -> None:
    async with recording() as recorder:
        channel = await connection_to(recorder.port, closing)
        await channel.open()
        answers = [channel.send("", echo(word), PLENTY_S) for word in "abc"]
        await eventually(lambda: came(recorder, 3), what="the calls")
        assert recorder.reads == [b"".join(map(echo, "abc"))]
        recorder.writers[-1].write(b"+a\r\n+b\r\n+c\r\n")
        assert await asyncio.gather(*answers) == [b"a", b"b", b"c"]


async def came(recorder: Recorder, count: int) -> bool:
    return sum(read.count(b"ECHO") for read in recorder.reads) >= count


async def test_call_when_cancelled_after_it_was_sent_then_it_keeps_its_place(closing: AsyncExitStack) -> None:
    async with recording() as recorder:
        channel = await connection_to(recorder.port, closing)
        first, second = channel.send("", echo(1), PLENTY_S), channel.send("", echo(2), PLENTY_S)
        await eventually(lambda: came(recorder, 2), what="the calls")
        first.cancel()
        recorder.writers[-1].write(b"+one\r\n+two\r\n")
        assert await second == b"two"


async def test_call_when_cancelled_before_it_was_sent_then_it_never_is(closing: AsyncExitStack) -> None:
    async with recording() as recorder:
        channel = await connection_to(recorder.port, closing)
        await channel.open()
        first, second = channel.send("", echo(1), PLENTY_S), channel.send("", echo(2), PLENTY_S)
        first.cancel()
        await eventually(lambda: came(recorder, 1), what="the call")
        assert recorder.reads == [echo(2)]
        recorder.writers[-1].write(b"+two\r\n")
        assert await second == b"two"


async def test_call_when_it_times_out_before_others_then_it_fails_alone_and_keeps_its_place(
    closing: AsyncExitStack,
) -> None:
    async with recording() as recorder:
        channel = await connection_to(recorder.port, closing)
        first, late, patient = (channel.send("", echo(word), s) for word, s in ((1, PLENTY_S), (2, 0.1), (3, PLENTY_S)))
        await eventually(lambda: came(recorder, 3), what="the calls")
        with pytest.raises(LimiterUnavailable, match="did not answer in time") as unknown:
            await late
        assert unknown.value.execution is Execution.UNKNOWN
        recorder.writers[-1].write(b"+one\r\n+two\r\n+three\r\n")
        assert (await first, await patient) == (b"one", b"three")
        assert len(recorder.writers) == 1


async def test_server_when_it_is_slow_but_answers_one_after_the_other_then_it_is_not_silent(
    closing: AsyncExitStack,
) -> None:
    """Times are seconds: a call of 1 s that was sent at 100, and what came last."""
    async with recording() as recorder:
        channel = await connection_to(recorder.port, closing)
        await channel.open()
        assert channel._protocol
        protocol = channel._protocol
        assert not protocol.is_silent(1000)
        protocol.waiting.append(_Call(asyncio.get_running_loop().create_future(), b"", sent_s=100.0, timeout_s=1.0))
        for last_read_s, now, silent in (
            (90, 100.9, False),
            (90, 101, True),
            (100.5, 101.4, False),
            (100.5, 101.5, True),
        ):
            protocol._last_read_s = last_read_s
            assert protocol.is_silent(now) is silent
        protocol.waiting.clear()


async def test_server_when_it_answers_and_then_falls_silent_then_the_connection_is_dropped(
    closing: AsyncExitStack,
) -> None:
    async with recording() as recorder:
        channel = await connection_to(recorder.port, closing)
        first, second = channel.send("", echo(1), PLENTY_S), channel.send("", echo(2), 0.1)
        await eventually(lambda: came(recorder, 2), what="the calls")
        recorder.writers[-1].write(b"+one\r\n")
        assert await first == b"one"
        with pytest.raises(LimiterUnavailable, match="the outcome is unknown"):
            await second

        async def is_given_up() -> bool:
            return channel._protocol is None

        await eventually(is_given_up, what="the end of the connection")
        after = channel.send("", echo(3), PLENTY_S)
        await eventually(lambda: came(recorder, 3), what="the call")
        recorder.writers[-1].write(b"+three\r\n")
        assert await after == b"three"


async def test_server_when_it_is_silent_then_the_connection_is_dropped_and_the_next_call_has_another(
    closing: AsyncExitStack,
) -> None:
    async with recording() as recorder:
        channel = await connection_to(recorder.port, closing)
        late, patient = channel.send("", echo(1), 0.1), channel.send("", echo(2), PLENTY_S)
        for call in (late, patient):
            with pytest.raises(LimiterUnavailable, match="the outcome is unknown") as unknown:
                await call
            assert unknown.value.execution is Execution.UNKNOWN
        after = channel.send("", echo(3), PLENTY_S)
        await eventually(lambda: came(recorder, 3), what="the call")
        recorder.writers[-1].write(b"+three\r\n")
        assert (await after, len(recorder.writers)) == (b"three", 2)


@pytest.mark.parametrize("reply", [b"+unexpected\r\n", b"what?\r\n"])
async def test_server_when_it_sends_what_is_not_a_reply_then_the_connection_is_dropped(
    closing: AsyncExitStack, reply: bytes
) -> None:
    async with recording() as recorder:
        channel = await connection_to(recorder.port, closing)
        call = channel.send("", echo(1), PLENTY_S)
        await eventually(lambda: came(recorder, 1), what="the call")
        recorder.writers[-1].write(b"+one\r\n" + reply)
        assert await call == b"one"
        after = channel.send("", echo(2), PLENTY_S)
        await eventually(lambda: came(recorder, 2), what="the call")
        recorder.writers[-1].write(b"+two\r\n")
        assert (await after, len(recorder.writers)) == (b"two", 2)


async def test_connection_when_it_breaks_then_sent_calls_fail_with_an_unknown_outcome_and_the_next_call_has_another(
    closing: AsyncExitStack,
) -> None:
    async with recording() as recorder:
        channel = await connection_to(recorder.port, closing)
        sent = channel.send("", echo(1), PLENTY_S)
        await eventually(lambda: came(recorder, 1), what="the call")
        recorder.writers[-1].close()
        with pytest.raises(LimiterUnavailable, match="broke: the server closed it: the outcome is unknown") as unknown:
            await sent
        assert unknown.value.execution is Execution.UNKNOWN
        after = channel.send("", echo(2), PLENTY_S)
        await eventually(lambda: came(recorder, 2), what="the call")
        recorder.writers[-1].write(b"+two\r\n")
        assert await after == b"two"


async def test_server_when_unavailable_then_calls_fail_as_not_executed_and_succeed_once_it_is_back(
    own_server: MakeServer, closing: AsyncExitStack
) -> None:
    server = own_server()
    channel = await connection_to(server.port, closing)
    await channel.open()
    server.kill()
    refused: list[LimiterUnavailable] = []

    async def answers() -> bool:
        try:
            return bool(await channel.send("", echo("again"), PLENTY_S) == b"again")
        except LimiterUnavailable as error:
            refused.append(error)
            return False

    while len(refused) < 3:
        assert not await answers()
    assert all(error.execution is Execution.NOT_EXECUTED or "broke" in str(error) for error in refused)
    server.start()
    await eventually(answers, what="the way back")


async def test_server_when_it_hangs_in_the_handshake_then_the_call_ends_in_time_and_was_not_executed(
    own_server: MakeServer, closing: AsyncExitStack
) -> None:
    server = own_server()
    channel = await connection_to(server.port, closing)
    server.pause()
    with pytest.raises(LimiterUnavailable, match="not reached in time") as unsent:
        await channel.send("", echo(1), 0.05)
    assert unsent.value.execution is Execution.NOT_EXECUTED
    server.resume()


async def test_calls_when_more_wait_than_may_then_the_next_is_overloaded_and_later_there_is_room_again(
    own_server: MakeServer, closing: AsyncExitStack
) -> None:
    channel = await connection_to(own_server().port, closing, max_waiting=10)
    calls = [channel.send("", echo(number), PLENTY_S) for number in range(10)]
    with pytest.raises(Overloaded, match="10 calls are waiting") as refused:
        channel.send("", echo(10), PLENTY_S)
    assert refused.value.execution is Execution.NOT_EXECUTED
    assert len(await asyncio.gather(*calls)) == 10
    assert await channel.send("", echo(11), PLENTY_S) == b"11"


async def test_server_when_it_reads_slower_than_calls_come_then_they_wait_here_and_are_counted(
    closing: AsyncExitStack,
) -> None:
    """The server reads nothing at all: what is not in the kernel's buffers stays unsent, and fails as not executed."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.setblocking(False)
        loop = asyncio.get_running_loop()
        channel = await connection_to(listening.getsockname()[1], closing, max_waiting=100)
        opening = asyncio.ensure_future(channel.open())
        protocol, _ = await loop.sock_accept(listening)
        with protocol:
            await loop.sock_recv(protocol, 1000)
            await loop.sock_sendall(protocol, b"+OK\r\n+OK\r\n")
            await opening
            calls: list[Awaitable[object]] = []
            for _ in range(30):
                calls.append(channel.send("", echo("x" * 1_000_000), 1.0))
                await asyncio.sleep(0)
            outcomes = await asyncio.gather(*calls, return_exceptions=True)
    executions = [outcome.execution for outcome in outcomes if isinstance(outcome, LimiterUnavailable)]
    assert len(executions) == 30
    assert executions[0] is Execution.UNKNOWN
    assert executions[-1] is Execution.NOT_EXECUTED


async def test_errors_when_the_server_answers_one_then_only_its_caller_gets_it(
    own_server: MakeServer, closing: AsyncExitStack
) -> None:
    channel = await connection_to(own_server().port, closing)
    answers = await asyncio.gather(
        channel.send("", encode("EVALSHA", "0" * 40, 0), PLENTY_S),
        channel.send("", echo(1), PLENTY_S),
        channel.send("", encode("NONSENSE"), PLENTY_S),
        return_exceptions=True,
    )
    assert isinstance(answers[0], NoScriptError)
    assert answers[1] == b"1"
    assert isinstance(answers[2], ResponseError)


async def test_channel_when_its_address_names_a_database_then_it_is_that_one(
    own_server: MakeServer, closing: AsyncExitStack
) -> None:
    channel = await connection_to(own_server().port, closing, database=3)
    assert b"db=3 " in await channel.send("", encode("CLIENT", "INFO"), PLENTY_S)


async def test_channel_when_closed_then_waiting_and_later_calls_fail(closing: AsyncExitStack) -> None:
    async with recording() as recorder:
        channel = await connection_to(recorder.port, closing)
        call = channel.send("", echo(1), PLENTY_S)
        await eventually(lambda: came(recorder, 1), what="the call")
        await channel.aclose()
        with pytest.raises(LimiterUnavailable, match="closed"):
            await call
        with pytest.raises(LimiterUnavailable, match="closed"):
            channel.send("", echo(2), PLENTY_S)


async def test_channel_when_closed_with_calls_that_were_not_sent_then_they_fail_and_it_does_not_connect(
    closing: AsyncExitStack,
) -> None:
    async with recording() as recorder:
        channel = await connection_to(recorder.port, closing)
        await channel.open()
        call = channel.send("", echo(1), PLENTY_S)  # closed in the same turn
        await channel.aclose()
        with pytest.raises(LimiterUnavailable, match="closed") as unsent:
            await call
        assert unsent.value.execution is Execution.NOT_EXECUTED
        assert (recorder.reads, len(recorder.writers), channel._dialling) == ([], 1, None)


def test_channel_when_the_loop_is_uvloop_then_it_works_the_same() -> None:
    async def calls() -> None:
        async with recording() as recorder, AsyncExitStack() as closing:
            channel = await connection_to(recorder.port, closing)
            first, second = channel.send("", echo(1), PLENTY_S), channel.send("", echo(2), 0.1)
            await eventually(lambda: came(recorder, 2), what="the calls")
            recorder.writers[-1].write(b"+one\r\n")
            assert await first == b"one"
            with pytest.raises(LimiterUnavailable, match="did not answer in time"):
                await second

    uvloop.run(calls())
