"""Idempotency: a request is served once, however often it is sent, by its `Idempotency-Key` or as an SDK's own retry.

An attempt claims its key before credits are reserved. The claim names the attempt's hold and expires after it, so that
a node that dies does not block the key for long. An attempt that was debited records its answer for replay, or, if that
is too large, its client left or the budgets of kept answers are used up, just that it was served: no retry is debited
again. An attempt that was not debited leaves nothing. The answer never waits for any of this.

An SDK's retries are distinguished from other requests with the same body by the number that the SDK counts: a record is
replayed once for each number above its own. A first attempt that met an unavailable Redis left no record, so this node
remembers it: its retries must not be answered with an earlier request's record. A first attempt that no node, or
another node, saw can still be mistaken for the earlier request.

The hold's id is the attempt's, not the key's: the release of a first attempt may arrive late, and with a common id it
would release the hold of the second one. Nothing here reserves or settles.
"""

import asyncio
import hashlib
import math
import re
import string
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import NoReturn, Self

from aiohttp import web
from multidict import istr

from limiter.errors import Execution, LimiterUnavailable, OutOfMemory
from limiter.relay.http.problems import REQUEST_ID, Problem, ProblemRaised, fail
from limiter.relay.metering.answer_recorder import Answer, AnswerRecorder
from limiter.relay.metering.background_retries import BackgroundRetries
from limiter.relay.metering.claims import Claimed, Claims, ClaimStatus
from limiter.relay.metering.kept_answers import KeptAnswers
from limiter.relay.telemetry.metrics import KeepOutcome

KEY_HEADER = istr("Idempotency-Key")
REPLAYED_HEADER = "Idempotency-Replayed"
_RETRY_HEADER = istr("x-stainless-retry-count")  # the OpenAI SDKs count retries in it: "0" for a first attempt
_MAX_KEY_LENGTH = 255
_PRINTABLE = frozenset(string.ascii_letters + string.digits + string.punctuation + " ")
_QUOTED = re.compile(r'"((?:[^"\\]|\\["\\])*)"')  # a string of RFC 9651
_CLAIM_OUTLIVES_HOLD_MS = 60_000  # otherwise a second attempt could join one that takes its full time
_RETRY_PAUSES_S = (0.02, 0.05, 0.1, 0.2)  # an answer may reach its client before its record or drop reaches Redis
_UNDECIDED = frozenset((ClaimStatus.RUNNING, ClaimStatus.BUSY))
_MAX_UNDOS = 256  # at once: each is retried while Redis is unavailable
_MAX_MISSED = 10_000  # remembered by this node
_MAX_DIGITS = 3  # of a retry count: no SDK tries so often
_MAX_KEPT_FOR_SDK = 64 << 10  # bytes of an answer that is kept for an SDK's retry alone, which few requests ever need
_BIG_BODY = 1 << 20  # hashed in a thread


@dataclass(frozen=True, slots=True)
class _Slot:
    """The place of an attempt's record. attempt: its number, for requests without a key whose SDK counts retries."""

    install_id: str
    key: str
    fingerprint: str
    keep_ms: int
    attempt: int | None


class Attempt:
    """One attempt at a request, until its `with` block ends: then its answer is recorded, or its claim is dropped.

    Attributes:
        hold_id: the id for its hold, which is also the request's id.
        recorder: records its answer.
        replay: the answer of an earlier attempt, which is to be sent instead of serving the request.
        identity: what the attempts at one request have in common; None if they are not recognised.
        is_retry: whether it may be a repeat of an earlier attempt.
    """

    __slots__ = ("_on_end", "hold_id", "identity", "is_retry", "recorder", "replay")

    def __init__(
        self,
        recorder: AnswerRecorder,
        *,
        replay: web.Response | None = None,
        identity: str | None = None,
        is_retry: bool = False,
        on_end: Callable[[], None] | None = None,
    ) -> None:
        self.identity, self.is_retry = identity, is_retry
        self.hold_id, self.recorder, self.replay = recorder.hold_id, recorder, replay
        self._on_end = on_end

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._on_end is not None:  # no await, so that it works also when the client has left
            self._on_end()

    def end_later(self) -> Callable[[bool], None]:
        """Do not end with the block. Return the function that ends it, which takes whether it was debited."""
        on_end, self._on_end = self._on_end, None

        def end(is_debited: bool) -> None:
            if is_debited:
                self.recorder.debited()
            if on_end is not None:
                on_end()

        return end


class Idempotency:
    """Prevents requests from being served twice, on any number of nodes.

    Args:
        claims: the claims in Redis.
        retries: makes calls in the background, and retries them while Redis is unavailable.
        hold_ms: how long a hold lives, in milliseconds; a claim outlives it.
        keep_s: how long the record of a key is kept, in seconds.
        keep_bytes: the largest body that is recorded.
        retry_window_s: how long after its end a request without a key can be recognised by an SDK's retry, in seconds;
            0 for never.
        keep_per_install_b: for the kept answers of one install, in bytes.
        keep_in_all_b: for those of all installs.
        counted: called with what became of each answer that was to be kept.
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
        keep_per_install_b: int = 8 << 20,
        keep_in_all_b: int = 256 << 20,
        counted: Callable[[KeepOutcome], None] = lambda _outcome: None,
    ) -> None:
        self._kept = KeptAnswers(claims, per_install_b=keep_per_install_b, in_all_b=keep_in_all_b)
        self._counted = counted
        self._claims, self._retries = claims, retries
        self._claim_ms = hold_ms + _CLAIM_OUTLIVES_HOLD_MS
        self._keep_ms, self._window_ms = keep_s * 1000, retry_window_s * 1000
        self._keep_bytes = keep_bytes
        self._undos = 0
        self._missed_s: dict[str, float] = {}  # in the order of their times

    async def begin(self, request: web.Request, install_id: str, body: bytes | None) -> Attempt:
        """Begin an attempt: claim its key, if it has one, or find the answer of an earlier attempt.

        body: the complete body; None for an upload, whose key is checked against its length only, and whose retries
        are not recognised without a key.

        Raises ProblemRaised: 400 for an invalid key, 409 while another attempt runs or if its answer was not kept, 422
        for a key that was used for another request, 429 for an answer that was returned too often; and
        LimiterUnavailable.
        """
        owner = request[REQUEST_ID]
        slot = await self._slot(request, install_id, body)
        if slot is None:
            return Attempt(AnswerRecorder(owner))
        claimed = await self._claim(slot, owner)
        if claimed.status is not ClaimStatus.CLAIMED:
            return Attempt(AnswerRecorder(owner), replay=_replayed(request, claimed))
        limit = self._keep_bytes if slot.attempt is None else min(self._keep_bytes, _MAX_KEPT_FOR_SDK)
        recorder = AnswerRecorder(owner, limit, lambda: self._record_begin(slot, owner))
        return Attempt(
            recorder,
            identity=slot.key.rpartition(":")[2],
            is_retry=slot.attempt != 0,
            on_end=lambda: self._record_end(slot, owner, recorder),
        )

    async def missed(self, request: web.Request, install_id: str, body: bytes | None) -> None:
        """Remember that a request ends without a claim, as Redis is unavailable; arguments as for `begin`.

        Its SDK will retry it, and must not receive the answer of an earlier request with the same body.
        Raises ProblemRaised (400) for an invalid key.
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
            claim_key = self._claims.keys.claim(install_id, key)
            return _Slot(install_id, claim_key, fingerprint, self._keep_ms, attempt=None)
        if attempt is None or body is None or not self._window_ms:
            return None
        fingerprint = await _fingerprint(request, body)
        claim_key = self._claims.keys.sdk_retry(install_id, fingerprint)
        return _Slot(install_id, claim_key, fingerprint, self._window_ms, attempt)

    async def _claim(self, slot: _Slot, owner: str) -> Claimed:
        for pause_s in (*_RETRY_PAUSES_S, 0):
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
                if not isinstance(error, LimiterUnavailable) or error.execution is Execution.UNKNOWN:
                    self._undo(slot, owner, claiming)
                raise
            if claimed.status not in _UNDECIDED:
                self._missed_s.pop(slot.key, None)  # from now on the record has it
                break
            await asyncio.sleep(pause_s)
        return claimed

    def _since_missed_ms(self, slot: _Slot) -> int | None:
        """Return how long ago this node refused what may be the first attempt of this request, in milliseconds."""
        at_s = self._missed_s.get(slot.key)
        return None if at_s is None else int((time.monotonic() - at_s) * 1000)

    def _undo(self, slot: _Slot, owner: str, claiming: "asyncio.Future[Claimed]") -> None:
        """Drop a claim whose reply was lost; if there are too many such claims, let it expire."""
        if self._undos == _MAX_UNDOS:
            return
        self._undos += 1

        async def drop() -> None:
            await asyncio.wait({claiming})
            await self._claims.drop(slot.key, owner)

        def count_down(_outcome: object) -> None:
            self._undos -= 1

        self._retries.start("drop of what may be a claim", owner, drop, on_end=count_down)

    def _record_begin(self, slot: _Slot, owner: str) -> None:
        self._retries.start(
            "note of a stream",
            owner,
            lambda: self._claims.record(
                slot.key, owner, slot.fingerprint, keep_ms=self._stream_keep_ms(slot), busy_ms=self._claim_ms
            ),
        )

    def _stream_keep_ms(self, slot: _Slot) -> int:
        """Return how long to keep the record of a running stream: at least as long as the stream may take."""
        return max(slot.keep_ms, self._claim_ms)

    def _record_end(self, slot: _Slot, owner: str, recorder: AnswerRecorder) -> None:
        if not recorder.debit_stands:
            self._retries.start("drop of a claim", owner, lambda: self._claims.drop(slot.key, owner))
            return
        answer = recorder.answer()
        packed = answer.packed() if answer else None

        async def record() -> None:
            if packed is None:
                outcome: KeepOutcome = "not_kept"
            else:
                outcome = await self._keep(slot, owner, packed)
            if outcome != "kept":
                await self._claims.record(slot.key, owner, slot.fingerprint, keep_ms=slot.keep_ms)
            self._counted(outcome)

        self._retries.start("record of an answer", owner, record)

    async def _keep(self, slot: _Slot, owner: str, packed: bytes) -> KeepOutcome:
        """Keep an answer, if the budgets and Redis' memory have room for it. Raises LimiterUnavailable."""
        try:
            has_key = slot.attempt is None
            shortage = await self._kept.count(slot.install_id, len(packed), slot.keep_ms, has_key=has_key)
            if shortage is None:
                await self._claims.keep(slot.key, owner, slot.fingerprint, keep_ms=slot.keep_ms, answer=packed)
        except OutOfMemory:
            return "out_of_memory"
        return shortage or "kept"


def idempotency_key(request: web.Request) -> str | None:
    """Return the `Idempotency-Key`, quoted as a string of RFC 9651 or bare, or None. Raises ProblemRaised (400)."""
    values = request.headers.getall(KEY_HEADER, [])
    if not values:
        return None
    key = values[0].strip(" \t")
    if key.startswith('"'):
        quoted = _QUOTED.fullmatch(key)
        key = re.sub(r"\\(.)", r"\1", quoted[1]) if quoted else ""
    if len(values) > 1 or not 1 <= len(key) <= _MAX_KEY_LENGTH or not _PRINTABLE.issuperset(key):
        fail(
            400,
            "invalid_idempotency_key",
            "Invalid Idempotency-Key",
            f"Send one {KEY_HEADER} of 1 to {_MAX_KEY_LENGTH} printable ASCII characters, quoted or bare.",
        )
    return key


def _attempt(request: web.Request) -> int | None:
    """Return the number of earlier attempts that an SDK has counted, or None if the client does not count."""
    text = request.headers.get(_RETRY_HEADER, "")
    return int(text) if text.isascii() and text.isdigit() and len(text) <= _MAX_DIGITS else None


async def _fingerprint(request: web.Request, body: bytes | None) -> str:
    """Return a digest of method, path and body."""
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
            "The same request is being served now: send it again when that has finished.",
            retry_after_s=1,
        )
        raise ProblemRaised(problem)
    if claimed.status in (ClaimStatus.BUSY, ClaimStatus.REUSED):
        _fail_reused()
    if claimed.status is ClaimStatus.LIMITED:
        problem = Problem(
            429,
            "rate_limited",
            "Too many repeats",
            "This request was served, and its answer was sent again several times within a minute.",
            retry_after_s=math.ceil(claimed.wait_ms / 1000),
        )
        raise ProblemRaised(problem)
    answer = Answer.unpacked(claimed.answer) if claimed.status is ClaimStatus.KEPT else None
    if answer is None:
        problem = Problem(
            409,
            "idempotency_answer_not_kept",
            "Served already",
            "This request was served and paid for, but its answer was not kept: it was too large, it broke off, its "
            "client left, or too much is kept already. To be served again, send it as a new request.",
            may_retry=False,
        )
        raise ProblemRaised(problem)
    request[REQUEST_ID] = answer.hold_id
    headers = [*answer.headers, (REPLAYED_HEADER, "true")]
    response = web.Response(status=answer.status, headers=headers, body=answer.body)
    if not request.content.at_eof():
        response.force_close()  # the rest of an upload will not be read
    return response


def _fail_reused() -> NoReturn:
    fail(
        422,
        "idempotency_key_reused",
        "Idempotency-Key reused",
        f"This {KEY_HEADER} was sent before with another request: send a new key with a new request.",
    )
