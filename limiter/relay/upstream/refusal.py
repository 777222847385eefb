"""What a backend's refusal says: how long to wait, and whether it is about the operator and not about the request.

Gemini's OpenAI layer answers in Google's form (https://cloud.google.com/apis/design/errors), also within an array;
others do in OpenAI's or one like it. Pure: nothing is sent or logged here.
"""

import math
import re
import time
from collections.abc import Iterator, Mapping
from datetime import UTC
from email.utils import parsedate_to_datetime
from typing import Literal, NamedTuple

import orjson
from aiohttp import hdrs

Cause = Literal["key", "place", "billing", "account", "model"]
_MAX_WAIT_S = 3600
_NUMBER = re.compile(r"\d{1,15}(?:\.\d{1,15})?", re.ASCII)
_RETRY_INFO = "google.rpc.RetryInfo"
_RATE_LIMITED = 429
_BY_STATUS: Mapping[int, Cause] = {401: "key", 402: "billing", 403: "account", 407: "account"}
# The words of google.rpc.ErrorInfo, of OpenAI, and of those that speak like them.
_BY_CODE: Mapping[str, Cause] = {
    "API_KEY_INVALID": "key",
    "API_KEY_EXPIRED": "key",
    "API_KEY_SERVICE_BLOCKED": "key",
    "API_KEY_HTTP_REFERRER_BLOCKED": "key",
    "API_KEY_IP_ADDRESS_BLOCKED": "key",
    "ACCESS_TOKEN_EXPIRED": "key",
    "CREDENTIALS_MISSING": "key",
    "UNAUTHENTICATED": "key",
    "invalid_api_key": "key",
    "incorrect_api_key": "key",
    "authentication_error": "key",
    "BILLING_DISABLED": "billing",
    "billing_error": "billing",
    "billing_hard_limit_reached": "billing",
    "billing_not_active": "billing",
    "insufficient_quota": "billing",
    "insufficient_credits": "billing",
    "LOCATION_POLICY_VIOLATED": "place",
    "unsupported_country_region_territory": "place",
    "SERVICE_DISABLED": "account",
    "CONSUMER_INVALID": "account",
    "CONSUMER_SUSPENDED": "account",
    "USER_PROJECT_DENIED": "account",
    "PERMISSION_DENIED": "account",
    "permission_error": "account",
    "account_deactivated": "account",
    "organization_deactivated": "account",
    "invalid_organization": "account",
    "ip_not_authorized": "account",
}
_WORDS: tuple[tuple[str, Cause], ...] = (
    (r"\bapi[ _-]?key\b|\bauthentication credentials?\b", "key"),
    (r"location is not supported|country, region,? or territory|available in your (?:country|region)", "place"),
    (r"prepay\w* credits|credit balance|insufficient (?:balance|credits|funds)", "billing"),
    (r"have access to (?:it|this|the model|model)\b|verified to use (?:the|this) model", "model"),
    (r"available (?:to|for) new (?:users|customers)|not allowed to use (?:the|this) model", "model"),
    (r"\b(?:account|project|organi[sz]ation)\b.{0,80}\b(?:deactivated|denied|disabled|suspended)", "account"),
)
_BY_TEXT = tuple((re.compile(words, re.IGNORECASE), cause) for words, cause in _WORDS)
_BILLING = re.compile(r"\bbilling\b", re.IGNORECASE)


class Refusal(NamedTuple):
    """A refusal that is about the operator.

    Attributes:
        cause: what it is about.
        text: the backend's own words, for the operator.
        is_certain: it says so by its status or by a code, and not only in words, which may quote a request.
    """

    cause: Cause
    text: str
    is_certain: bool


def wait_s(headers: Mapping[str, str], body: bytes = b"") -> int:
    """Return how long a backend asks to wait, in seconds from 1 to 3600; 1 if it does not say.

    By retry-after-ms, Retry-After as a number or a date, or google.rpc.RetryInfo in the body, the first of them.
    """
    found_s = _milliseconds(headers.get("retry-after-ms"))
    if found_s is None:
        found_s = _seconds_or_date(headers.get(hdrs.RETRY_AFTER), headers.get(hdrs.DATE))
    if found_s is None:
        found_s = _retry_info(body)
    return 1 if found_s is None else min(_MAX_WAIT_S, max(1, math.ceil(found_s)))


def about_operator(status: int, body: bytes) -> Refusal | None:
    """Return why a refusal is about the operator; None if it is about the request. body: without its packing."""
    cause, text = _BY_STATUS.get(status), ""
    said: Cause | None = None
    for error in _errors(body):
        text = text or _text(error.get("message"))
        said = said or next((_BY_CODE[code] for code in _codes(error) if code in _BY_CODE), None)
    in_words = next((found for words, found in _BY_TEXT if words.search(text)), None)
    if in_words is None and status != _RATE_LIMITED and _BILLING.search(text):
        in_words = "billing"  # a rate limit tells everyone to look at plan and billing
    is_certain = cause is not None or said is not None
    if in_words is not None and (said is None or said == "account"):
        said = in_words  # they say more than a status, or than that permission is denied
    cause = said or cause
    return None if cause is None else Refusal(cause, text, is_certain and cause != "model")


def _milliseconds(text: str | None) -> float | None:
    return float(text) / 1000 if text is not None and _NUMBER.fullmatch(text.strip()) else None


def _seconds_or_date(text: str | None, now: str | None) -> float | None:
    if text is None:
        return None
    if _NUMBER.fullmatch(text.strip()):
        return float(text)
    until_s = _epoch_s(text)
    if until_s is None:
        return None
    now_s = _epoch_s(now) if now else None  # by its own clock, if it shows it
    return until_s - (time.time() if now_s is None else now_s)


def _epoch_s(date: str) -> float | None:
    try:
        parsed = parsedate_to_datetime(date)
        return parsed.replace(tzinfo=parsed.tzinfo or UTC).timestamp()
    except (ValueError, OverflowError):
        return None


def _retry_info(body: bytes) -> float | None:
    for error in _errors(body):
        for detail in _members(error.get("details")):
            delay = detail.get("retryDelay")
            if str(detail.get("@type", "")).endswith(_RETRY_INFO) and isinstance(delay, str):
                return _seconds_or_date(delay.removesuffix("s"), None)
    return None


def _errors(body: bytes) -> Iterator[Mapping[str, object]]:
    """Yield the error objects of a body in the forms that are in use."""
    try:
        document = orjson.loads(body)
    except orjson.JSONDecodeError:
        text = body.decode(errors="replace")
        yield {"message": "" if text.lstrip().startswith("<") else text[:1000]}
        return
    for item in _members(document if isinstance(document, list) else [document]):
        error = item.get("error")
        if isinstance(error, dict):
            yield error
        else:
            yield {**item, "message": error if isinstance(error, str) else item.get("message") or item.get("detail")}


def _codes(error: Mapping[str, object]) -> Iterator[str]:
    yield from (_text(detail.get("reason")) for detail in _members(error.get("details")))
    yield from (_text(error.get(name)) for name in ("code", "type", "status"))


def _members(value: object) -> Iterator[Mapping[str, object]]:
    if isinstance(value, list):
        yield from (each for each in value if isinstance(each, dict))


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""
