"""Serves a request once, however often it is sent: by its `Idempotency-Key`, or as the repeat that an SDK makes itself.

An attempt claims its key before anything is reserved; the claim names its hold, and lapses after it, so that a node
that dies blocks nothing for long. An attempt that was debited leaves its answer, to be replayed, or the note that it
was served: a client that leaves half-way, and an answer that is too large to keep, are never debited a second time. An
attempt that was not debited leaves nothing. The answer never waits for any of it.

An SDK's repeats are told from other requests that ask the same by their number: a record is told once to each number
above its own. A first attempt that found Redis away left no record, so this node remembers it: its repeats are not to
be answered with what came before it. What no node saw, or another, can still be taken for the request before.

The hold's id is the attempt's, not the key's: the release of a first attempt may come late, and with one id for both it
would give back the hold of the second. Nothing here reserves or settles.
"""

import asyncio
import hashlib
import re
import string
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import NoReturn, Self

from aiohttp import web

from limiter.errors import LimiterUnavailable
from limiter.relay.http.problems import REQUEST_ID, Problem, ProblemRaised, fail
from limiter.relay.metering.answer_recorder import Answer, AnswerRecorder
from limiter.relay.metering.background_retries import BackgroundRetries
from limiter.relay.metering.claims import Claimed, Claims, ClaimStatus

KEY_HEADER = "Idempotency-Key"
REPLAYED_HEADER = "Idempotency-Replayed"
_RETRY_HEADER = "x-stainless-retry-count"  # the OpenAI SDKs count in it: "0" for a first attempt
_MAX_KEY_LENGTH = 255
_PRINTABLE = frozenset(string.ascii_letters + string.digits + string.punctuation + " ")
_QUOTED = re.compile(r'"((?:[^"\\]|\\["\\])*)"')  # a string of RFC 9651
_CLAIM_OUTLIVES_HOLD_MS = 60_000  # or an attempt that takes its whole time would be joined by another
_PATIENCE_S = (0.02, 0.05, 0.1, 0.2)  # an answer may reach its client before the note of it, or its drop, reaches Redis
_UNDECIDED = frozenset((ClaimStatus.RUNNING, ClaimStatus.BUSY))
_MAX_UNDOS = 256  # at once: each keeps asking a Redis that is away
_MAX_MISSED = 10_000  # remembered by this node
_MAX_DIGITS = 3  # of a retry count: no SDK tries so often
_BIG_BODY = 1 << 20  # hashed in a thread


@dataclass(frozen=True, slots=True)
class _Slot:
    """Where an attempt leaves its record. attempt: its number, where an SDK counts and nothing names the request."""

    key: str
    fingerprint: str
    keep_ms: int
    attempt: int | None


class Attempt:
    """One attempt at a request, until its `with` block ends: then its answer is recorded, or its claim is dropped.

    hold_id: what it reserves with, which is the request's id too. recorder: of its answer. replay: the answer of the
    attempt before it, which is to be sent in place of serving.
    """

    __slots__ = ("_on_end", "hold_id", "recorder", "replay")

    def __init__(
        self,
        recorder: AnswerRecorder,
        *,
        replay: web.Response | None = None,
        on_end: Callable[[], None] | None = None,
    ) -> None:
        self.hold_id, self.recorder, self.replay = recorder.hold_id, recorder, replay
        self._on_end = on_end

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._on_end is not None:  # without an await: it is the same for a client that left
            self._on_end()


class Idempotency:
    """Keeps requests from being served twice, on any number of nodes.

    Args:
        claims: the keys in Redis.
        retries: makes calls in the background, repeated while Redis is unavailable.
        hold_ms: how long a hold lives, in milliseconds; a claim outlives it.
        keep_s: for how long a key is remembered, in seconds.
        keep_bytes: the largest body that is kept.
        retry_window_s: for how many seconds after its end a request is known to an SDK's retry that has no key; 0 for
            never.
    """

    def __init__(
        self,
        claims: Claims,
        retries: BackgroundRetries,
        *,
        hold_ms: int,
        keep_s: int = 86_400,
        keep_bytes: int = 1 << 20,
        retry_window_s: int = 60,
    ) -> None:
        self._claims, self._retries = claims, retries
        self._claim_ms = hold_ms + _CLAIM_OUTLIVES_HOLD_MS
        self._keep_ms, self._window_ms = keep_s * 1000, retry_window_s * 1000
        self._keep_bytes = keep_bytes
        self._undos = 0
        self._missed_s: dict[str, float] = {}  # in the order of their times

    async def begin(self, request: web.Request, install_id: str, body: bytes | None) -> Attempt:
        """Begin an attempt: claim its key, if it has one, or find the answer of the attempt before it.

        body: as it came, whole; None for an upload that passes by: its key is then checked against the length only, and
        no retry without a key is known.

        Raises ProblemRaised: 400 for a key that is not valid, 409 while another attempt runs, or when its answer was
        not kept, 422 for a key that was used for another request; LimiterUnavailable.
        """
        owner = request[REQUEST_ID]
        slot = await self._slot(request, install_id, body)
        if slot is None:
            return Attempt(AnswerRecorder(owner))
        claimed = await self._claim(slot, owner)
        if claimed.status is not ClaimStatus.CLAIMED:
            return Attempt(AnswerRecorder(owner), replay=_replayed(request, claimed))
        recorder = AnswerRecorder(owner, self._keep_bytes, lambda: self._note_begun(slot, owner))
        return Attempt(recorder, on_end=lambda: self._note_end(slot, owner, recorder))

    async def missed(self, request: web.Request, install_id: str, body: bytes | None) -> None:
        """Note that a request ends without a claim, as Redis is unavailable; arguments as for `begin`.

        Its SDK will send it again, and what an earlier request left in the same place must not be taken for its own.
        Raises ProblemRaised (400) for a key that is none.
        """
        if idempotency_key(request) is not None or _attempt(request) != 0:
            return
        slot = await self._slot(request, install_id, body)
        if slot is not None:
            self._missed_s.pop(slot.key, None)
            self._missed_s[slot.key] = time.monotonic()
            if len(self._missed_s) > _MAX_MISSED:
                del self._missed_s[next(iter(self._missed_s))]

    async def _slot(self, request: web.Request, install_id: str, body: bytes | None) -> _Slot | None:
        key, attempt = idempotency_key(request), _attempt(request)
        if key is not None:
            fingerprint = await _fingerprint(request, body)
            return _Slot(self._claims.keys.claim(install_id, key), fingerprint, self._keep_ms, attempt=None)
        if attempt is None or body is None or not self._window_ms:
            return None
        fingerprint = await _fingerprint(request, body)
        return _Slot(self._claims.keys.sdk_retry(install_id, fingerprint), fingerprint, self._window_ms, attempt)

    async def _claim(self, slot: _Slot, owner: str) -> Claimed:
        for pause_s in (*_PATIENCE_S, 0):
            claiming = asyncio.ensure_future(
                self._claims.claim(
                    slot.key,
                    owner,
                    slot.fingerprint,
                    claim_ms=self._claim_ms,
                    attempt=slot.attempt,
                    missed_ms=self._since_missed_ms(slot),
                )
            )
            try:
                claimed = await asyncio.shield(claiming)
            except (asyncio.CancelledError, LimiterUnavailable) as error:
                if not isinstance(error, LimiterUnavailable) or error.executed is not False:
                    self._undo(slot, owner, claiming)
                raise
            if claimed.status not in _UNDECIDED:
                self._missed_s.pop(slot.key, None)  # from here on the record knows of it
                break
            await asyncio.sleep(pause_s)
        return claimed

    def _since_missed_ms(self, slot: _Slot) -> int | None:
        """Tell how long ago this node had to turn away the first attempt of what may be this request."""
        at_s = self._missed_s.get(slot.key)
        return None if at_s is None else int((time.monotonic() - at_s) * 1000)

    def _undo(self, slot: _Slot, owner: str, claiming: "asyncio.Future[Claimed]") -> None:
        """Drop a claim whose answer nobody has; with too many such, it lapses by itself."""
        if self._undos == _MAX_UNDOS:
            return
        self._undos += 1

        async def drop() -> None:
            await asyncio.wait({claiming})
            await self._claims.drop(slot.key, owner)

        def undone(_outcome: object) -> None:
            self._undos -= 1

        self._retries.start("drop of what may be a claim", owner, drop, on_end=undone)

    def _note_begun(self, slot: _Slot, owner: str) -> None:
        self._retries.start(
            "note of a stream",
            owner,
            lambda: self._claims.record(
                slot.key, owner, slot.fingerprint, keep_ms=self._lasting_ms(slot), busy_ms=self._claim_ms
            ),
        )

    def _lasting_ms(self, slot: _Slot) -> int:
        """Give how long the note of a stream must live: at least as long as the stream may."""
        return max(slot.keep_ms, self._claim_ms)

    def _note_end(self, slot: _Slot, owner: str, recorder: AnswerRecorder) -> None:
        if not recorder.debit_stands:
            self._retries.start("drop of a claim", owner, lambda: self._claims.drop(slot.key, owner))
            return
        answer = recorder.answer()
        packed = answer.packed() if answer else b""
        self._retries.start(
            "record of an answer",
            owner,
            lambda: self._claims.record(slot.key, owner, slot.fingerprint, keep_ms=slot.keep_ms, answer=packed),
        )


def idempotency_key(request: web.Request) -> str | None:
    """Read `Idempotency-Key`, quoted as a string of RFC 9651 or bare; None without one. Raises ProblemRaised (400)."""
    given = request.headers.getall(KEY_HEADER, [])
    if not given:
        return None
    key = given[0].strip(" \t")
    if key.startswith('"'):
        quoted = _QUOTED.fullmatch(key)
        key = re.sub(r"\\(.)", r"\1", quoted[1]) if quoted else ""
    if len(given) > 1 or not 1 <= len(key) <= _MAX_KEY_LENGTH or not _PRINTABLE.issuperset(key):
        fail(
            400,
            "invalid_idempotency_key",
            "Invalid Idempotency-Key",
            f"Send one {KEY_HEADER} of 1 to {_MAX_KEY_LENGTH} printable ASCII characters, quoted or bare.",
        )
    return key


def _attempt(request: web.Request) -> int | None:
    """Tell how often an SDK says that it sent this before; None when no SDK counts."""
    text = request.headers.get(_RETRY_HEADER, "")
    return int(text) if text.isascii() and text.isdigit() and len(text) <= _MAX_DIGITS else None


async def _fingerprint(request: web.Request, body: bytes | None) -> str:
    """Tell what is asked for: method, path and body."""
    head = f"{request.method} {request.path_qs} "
    if body is None:
        text = f"{head}{request.content_type} {request.content_length}".encode()
        return hashlib.sha256(text).hexdigest()[:40]

    def digest() -> str:
        summed = hashlib.sha256(head.encode())
        summed.update(body)
        return summed.hexdigest()[:40]

    return await asyncio.to_thread(digest) if len(body) > _BIG_BODY else digest()


def _replayed(request: web.Request, claimed: Claimed) -> web.Response:
    if claimed.status is ClaimStatus.RUNNING:
        problem = Problem(
            409,
            "idempotency_in_progress",
            "Request in progress",
            "The same request is being served now: send it again when that is done.",
            retry_after_s=1,
        )
        raise ProblemRaised(problem)
    if claimed.status in (ClaimStatus.BUSY, ClaimStatus.REUSED):
        _fail_reused()
    answer = Answer.unpacked(claimed.answer) if claimed.status is ClaimStatus.KEPT else None
    if answer is None:
        problem = Problem(
            409,
            "idempotency_answer_not_kept",
            "Served already",
            "This request was served and paid for, but its answer was not kept: it was too large, or its client left. "
            "To be served again, send it as a new request.",
            may_retry=False,
        )
        raise ProblemRaised(problem)
    request[REQUEST_ID] = answer.hold_id
    headers = [*answer.headers, (REPLAYED_HEADER, "true")]
    response = web.Response(status=answer.status, headers=headers, body=answer.body)
    if not request.content.at_eof():
        response.force_close()  # an upload that nobody will read
    return response


def _fail_reused() -> NoReturn:
    fail(
        422,
        "idempotency_key_reused",
        "Idempotency-Key reused",
        f"This {KEY_HEADER} was sent before with another request: send a new key with a new request.",
    )
