"""Carries encoded commands to a server: many calls on one connection.

The calls of one iteration of the event loop are sent as one write, and replies are matched to them in order. It knows
neither scripts nor keys nor credits, and sends nothing twice. No blocking command may use it: all others would wait.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, Protocol, cast

import hiredis
from redis.asyncio.connection import AbstractConnection

from limiter._util.backoff import Backoff
from limiter.errors import Execution, LimiterUnavailable, Overloaded
from limiter.log_events import event
from limiter.redis.redis_private import error_from_reply, take_over
from limiter.redis.resp import ASKING, script_load

Answer = asyncio.Future[Any]
Dial = Callable[[], Awaitable[AbstractConnection]]
_LOG = logging.getLogger("limiter")
_TICK_S = 0.01  # how late a timeout may be reported
_MAX_WAITING = 8192  # at 50,000 decisions a second, the last waits a sixth of a second
_NO_REPLY = object()
_LATE = "Redis did not answer in time: the outcome is unknown"
_UNREACHED = "Redis was not reached in time"


class CommandChannel(Protocol):
    """Sends each command to a server that has its key, once."""

    def send(self, key: str, command: bytes, timeout_s: float) -> Awaitable[Any]:
        """Send an encoded command about this key; the answer ends within the timeout, whatever happens.

        Raises what the server answered, as redis-py's errors; LimiterUnavailable, with `execution` NOT_EXECUTED when
        nothing was sent; Overloaded. A cancelled call that was sent is executed all the same.
        """
        ...

    def load_script(self, key: str, text: str, timeout_s: float) -> Awaitable[Any]:
        """Load a script on each server to which a call about this key may go. Raises as `send`."""
        ...

    async def aclose(self) -> None:
        """Close the connections. Calls that still wait raise LimiterUnavailable."""
        ...


class _Call:
    """A command that waits to be sent, or for its reply."""

    __slots__ = ("answer", "command", "sent_s", "timeout_s")

    def __init__(self, answer: Answer, command: bytes, sent_s: float, timeout_s: float) -> None:
        self.answer = answer
        self.command = command
        self.sent_s = sent_s  # the loop's time at `send`
        self.timeout_s = timeout_s


class MultiplexedConnection:
    """The channel to one server. Make it inside the event loop that uses it.

    dial: returns a redis-py connection after its handshake; called again for the first call after the last connection
    broke. max_waiting: above this number of unanswered calls, further ones raise Overloaded.
    """

    def __init__(self, dial: Dial, *, max_waiting: int = _MAX_WAITING) -> None:
        self._dial = dial
        self._max_waiting = max_waiting
        self._loop = asyncio.get_running_loop()
        self._protocol: _ReplyProtocol | None = None
        self._unsent: list[_Call] = []
        self._flush_due = False
        self._dialling: asyncio.Task[None] | None = None
        self._backoff = Backoff(first_s=0.01, max_s=0.25)
        self._pause_s = 0.0  # before the next attempt to connect
        self._tick: asyncio.TimerHandle | None = None
        self._ticked = 0.0
        self._closed = False

    async def open(self) -> None:
        """Connect now, not at the first call. Raises what `dial` raises."""
        self._protocol = _ReplyProtocol(await self._dial(), self._loop, on_ready=self._flush, on_lost=self._lost)

    def send(self, key: str, command: bytes, timeout_s: float, *, asking: bool = False) -> Answer:  # noqa: ARG002
        """Send an encoded command; the key is ignored. See `CommandChannel`.

        asking: send ASKING just before it, for a cluster's slot that is being moved to this server.
        """
        protocol, unsent = self._protocol, self._unsent
        if len(unsent) + (len(protocol.waiting) if protocol is not None else 0) >= self._max_waiting:
            raise Overloaded(self._max_waiting)
        if self._closed:
            raise LimiterUnavailable("the connection was closed", execution=Execution.NOT_EXECUTED)
        loop = self._loop
        now = loop.time()
        answer = loop.create_future()
        if asking:
            unsent.append(_Call(cast("Answer", _AskingReply(answer)), ASKING, now, timeout_s))
        unsent.append(_Call(answer, command, now, timeout_s))
        if not self._flush_due:
            self._flush_due = True
            loop.call_soon(self._flush)
            if self._tick is None:
                self._tick = loop.call_later(_TICK_S, self._check)
        return answer

    def load_script(self, key: str, text: str, timeout_s: float) -> Answer:
        """Load a script on this server. See `CommandChannel`."""
        return self.send(key, script_load(text), timeout_s)

    def renew(self) -> None:
        """Replace the connection by a new one: another server has taken this one's place."""
        if self._protocol is not None:
            self._protocol.drop("another server took over")

    async def aclose(self) -> None:
        """Close the connection. Calls that still wait raise LimiterUnavailable."""
        self._closed = True
        if self._tick is not None:
            self._tick.cancel()
        unsent, self._unsent = self._unsent, []
        _fail(unsent, "the connection was closed", execution=Execution.NOT_EXECUTED)
        if self._dialling is not None:
            self._dialling.cancel()
            await asyncio.wait({self._dialling})  # it may connect all the same, see `CancelWatch`
        if self._protocol is not None:
            await self._protocol.close()

    def _flush(self) -> None:
        """Send the calls of this iteration; without a connection, connect first."""
        self._flush_due = False
        protocol = self._protocol
        if protocol is None:
            if self._unsent and self._dialling is None:
                self._dialling = self._loop.create_task(self._connect(), name="connection to Redis")
        elif self._unsent and not protocol.paused:
            calls, self._unsent = self._unsent, []
            protocol.write(calls)

    def _lost(self, protocol: "_ReplyProtocol", reason: str) -> None:
        """Fail the calls that were sent, with an unknown outcome; send the others on a new connection."""
        if protocol is self._protocol:
            self._protocol = None
            _fail(
                protocol.waiting,
                f"the connection to Redis broke: {reason}: the outcome is unknown",
                execution=Execution.UNKNOWN,
            )
            if self._unsent:
                self._flush()

    async def _connect(self) -> None:
        try:
            await asyncio.sleep(self._pause_s)
            await self.open()
        except Exception as error:  # noqa: BLE001  whatever the error, no caller may wait for ever
            self._pause_s = self._backoff.next_s()
            unsent, self._unsent = self._unsent, []
            _fail(unsent, f"Redis is not reachable: {error}", execution=Execution.NOT_EXECUTED)
        else:
            self._pause_s = 0.0
            self._backoff.reset()
        finally:
            self._dialling = None
        self._flush()

    def _check(self) -> None:
        """Fail the calls that have timed out. All of them are checked, as their timeouts differ."""
        # By the last tick, that is: if the loop itself was blocked, the replies that arrived meanwhile are read first.
        now, self._ticked = self._ticked, self._loop.time()
        if late := _late(self._unsent, now):
            _fail(late, _UNREACHED, execution=Execution.NOT_EXECUTED)
            self._unsent = [call for call in self._unsent if not call.answer.done()]
        protocol = self._protocol
        if protocol is not None:
            _fail(_late(protocol.waiting, now), _LATE, execution=Execution.UNKNOWN)
            if protocol.is_silent(now):
                protocol.drop("it did not answer")
        busy = self._unsent or (self._protocol and self._protocol.waiting)
        self._tick = self._loop.call_later(_TICK_S, self._check) if busy else None


class _ReplyProtocol(asyncio.Protocol):
    """One connection, taken over from redis-py after the handshake, and the calls sent on it."""

    def __init__(
        self,
        connection: AbstractConnection,
        loop: asyncio.AbstractEventLoop,
        *,
        on_ready: Callable[[], None],
        on_lost: Callable[["_ReplyProtocol", str], None],
    ) -> None:
        self.waiting: deque[_Call] = deque()  # cancelled ones, too: their replies still come
        self.paused = False
        self._loop = loop
        self._last_read_s = 0.0
        self._on_ready, self._on_lost = on_ready, on_lost
        self._closed = loop.create_future()
        self._reader = hiredis.Reader(replyError=error_from_reply, notEnoughData=_NO_REPLY)
        self._writer = take_over(connection)  # kept, as its transport closes when it is collected
        self._transport = cast("asyncio.Transport", self._writer.transport)
        if self._transport.is_closing():
            raise ConnectionResetError("the server closed the connection")
        self._transport.set_protocol(self)

    def write(self, calls: list[_Call]) -> None:
        """Send the commands of those calls that were not cancelled meanwhile."""
        calls = [call for call in calls if not call.answer.done()]
        self.waiting.extend(calls)
        self._transport.write(b"".join([call.command for call in calls]))

    def is_silent(self, now: float) -> bool:
        """Return whether nothing arrived for as long as the oldest call may take.

        Then the server hangs or the network is down, and what was sent may still be executed. A slow server still
        answers earlier calls meanwhile.
        """
        if not self.waiting:
            return False
        oldest = self.waiting[0]
        return now - max(oldest.sent_s, self._last_read_s) >= oldest.timeout_s

    def drop(self, reason: str) -> None:
        """Drop the connection."""
        self._on_lost(self, reason)
        self._transport.abort()

    async def close(self) -> None:
        """Close the connection, and wait until it is closed."""
        self.drop("it was closed")
        await self._closed

    def data_received(self, data: bytes) -> None:
        """Match the replies."""
        self._last_read_s = self._loop.time()
        reader, waiting = self._reader, self.waiting
        try:
            reader.feed(data)
            while (reply := reader.gets()) is not _NO_REPLY:
                answer = waiting.popleft().answer
                if answer.done():
                    continue
                if isinstance(reply, Exception):
                    answer.set_exception(reply)
                else:
                    answer.set_result(reply)
        except (hiredis.HiredisError, IndexError) as error:
            _LOG.error("Redis sent something that is not a reply: %s", error, extra=event("redis_protocol_error"))
            self.drop("it sent something that is not a reply")

    def connection_lost(self, exc: Exception | None) -> None:
        """Fail the calls of a connection that was lost."""
        self._on_lost(self, str(exc or "the server closed it"))
        if not self._closed.done():
            self._closed.set_result(None)

    def pause_writing(self) -> None:
        """Queue further calls: the server reads more slowly than they arrive."""
        self.paused = True

    def resume_writing(self) -> None:
        """Send the queued calls."""
        self.paused = False
        self._on_ready()


class _AskingReply:
    """The reply to ASKING, which is ignored. ASKING is not sent when the command after it is not."""

    def __init__(self, answer: Answer) -> None:
        self.done = answer.done

    def set_result(self, reply: object) -> None:
        """Ignore it."""

    def set_exception(self, error: Exception) -> None:
        """Ignore it: the command after it fails in the same way."""


def _late(calls: Iterable[_Call], now: float) -> list[_Call]:
    """Return the calls that have timed out."""
    return [call for call in calls if now - call.sent_s >= call.timeout_s]


def _fail(calls: Iterable[_Call], message: str, *, execution: Execution) -> None:
    for call in calls:
        if not call.answer.done():
            call.answer.set_exception(LimiterUnavailable(message, execution=execution))
