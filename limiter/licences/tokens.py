"""Verify licences: EdDSA-signed JWTs with the tier that an install has paid for, checked offline.

A public key is written `ed25519:<base64url>`; its `kid` is the start of its SHA-256, so that keys can be rotated.
This is what every relay does; `keys` makes keys and issues licences, and no relay has a private key.
"""

import base64
import binascii
import hashlib
import re
import time
from collections.abc import Container, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TypeGuard

import jwt
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from limiter.errors import LimiterError, SettingsError

_PREFIX = "ed25519:"
ALGORITHM = "EdDSA"
_LEEWAY_S = 30  # clocks of the issuer and of the relays may differ by this much
_MAX_TOKEN_LENGTH = 4096
_MAX_KNOWN = 1024  # licences that need not be verified again: a few megabytes at most
_MAX_REFUSED = 4096  # tokens that need not be refused again by a signature: a megabyte at most
_REFUSED_S = 60.0
# One licence has one spelling: no padding, nothing between the characters, and the last one of an Ed25519 signature has
# four bits to spare, which are 0. Only the header and the payload are protected by the signature, not its own text.
_SPELLING = re.compile(r"[A-Za-z0-9_-]{1,1024}\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]{85}[AQgw]")
_LAST_S = 253_402_300_799  # the last second of the year 9999


class InvalidLicence(LimiterError):  # noqa: N818  names the thing, as UnknownTier does
    """The token is not a valid licence: wrong signature, key, algorithm or claims."""


class ImmatureLicence(InvalidLicence):
    """The token is a licence that is not valid yet."""


class RevokedLicence(InvalidLicence):
    """The token is a licence that the operator has revoked."""


@dataclass(frozen=True, slots=True)
class Licence:
    """The claims of a licence, and its id, which follows from its text.

    expires_s: epoch seconds. installs: how many installs may use it; None: any number.
    """

    tier: str
    subject: str
    expires_s: int
    installs: int | None
    kid: str
    expired: bool
    id: str


class Licences:
    """The operator's public keys, which verify licences.

    Args:
        public_keys: as in the settings. Raises SettingsError.
        revoked: the ids and subjects of revoked licences, which may change.
    """

    def __init__(self, public_keys: Sequence[str], revoked: Container[str] = frozenset()) -> None:
        self._revoked = revoked
        self._refused: dict[bytes, tuple[float, str]] = {}  # by a token's digest: until when, and why
        self._keys: dict[str, Ed25519PublicKey] = {}
        for text in public_keys:
            key = _read_public_key(text)
            self._keys[key_id(key)] = key
        self._known = lru_cache(maxsize=_MAX_KNOWN)(self._read)

    def check(self, token: str) -> Licence:
        """Return the claims of a licence, with `expired` set if it has expired. Raises InvalidLicence, RevokedLicence.

        An expired licence is not looked up among the revoked ones, which are forgotten when they expire.
        """
        licence = self._known(token)
        if licence.expires_s + _LEEWAY_S <= time.time():
            return replace(licence, expired=True)
        if licence.id in self._revoked or licence.subject in self._revoked:
            raise RevokedLicence("the licence was revoked")
        return licence

    def _read(self, token: str) -> Licence:
        """Verify and read a licence, whether or not it has expired: the only thing in it that changes with time."""
        if len(token) > _MAX_TOKEN_LENGTH:
            raise InvalidLicence(f"the licence is longer than {_MAX_TOKEN_LENGTH} characters")
        if not is_spelled_as_licence(token):
            raise InvalidLicence("the licence is not valid: it is not spelled as a licence is")
        digest = hashlib.sha256(token.encode())
        until_s, cause = self._refused.get(digest.digest(), (0.0, ""))
        if time.monotonic() < until_s:
            raise InvalidLicence(cause)
        try:
            return self._verify(token, digest.hexdigest()[:32])
        except ImmatureLicence:
            raise  # it may be valid in a moment
        except InvalidLicence as error:
            while len(self._refused) >= _MAX_REFUSED:
                del self._refused[next(iter(self._refused))]
            self._refused[digest.digest()] = (time.monotonic() + _REFUSED_S, str(error))
            raise

    def _verify(self, token: str, licence_id: str) -> Licence:
        try:
            kid = jwt.get_unverified_header(token).get("kid")
            candidates = [self._keys[kid]] if kid in self._keys else list(self._keys.values()) if kid is None else []
            claims = _verified(token, candidates)
        except jwt.ImmatureSignatureError as error:
            raise ImmatureLicence(f"the licence is not valid: {error}") from None
        except (jwt.PyJWTError, RecursionError) as error:  # the latter from a header of nothing but brackets
            raise InvalidLicence(f"the licence is not valid: {error}") from None
        return _licence(claims, kid or "", licence_id)


def is_spelled_as_licence(text: str) -> bool:
    """Return whether a text has the form of a licence, in the one spelling that each has."""
    return _SPELLING.fullmatch(text) is not None


def _verified(token: str, candidates: Sequence[Ed25519PublicKey]) -> dict[str, object]:
    for key in candidates:
        try:
            # Expiry is looked at afterwards: an expired licence is still this user's, and served as core.
            claims: dict[str, object] = jwt.decode(
                token,
                key,
                algorithms=[ALGORITHM],
                leeway=_LEEWAY_S,
                options={"require": ["tier", "sub", "exp", "iat"], "verify_exp": False, "verify_aud": False},
            )
        except jwt.InvalidSignatureError:
            continue
        return claims
    raise jwt.InvalidSignatureError("no configured public key signed it")


def _licence(claims: dict[str, object], kid: str, licence_id: str) -> Licence:
    tier, subject, expires_s, installs = claims["tier"], claims["sub"], claims["exp"], claims.get("installs")
    if not isinstance(tier, str) or not isinstance(subject, str) or not _is_integer(expires_s):
        raise InvalidLicence("the licence is not valid: tier and sub must be text, exp a whole number")
    if installs is not None and (not _is_integer(installs) or installs < 1):
        raise InvalidLicence("the licence is not valid: installs must be a whole number above 0")
    if not 0 <= expires_s <= _LAST_S:
        raise InvalidLicence("the licence is not valid: its exp is not a date")
    return Licence(tier, subject, expires_s, installs, kid, expired=False, id=licence_id)


def _is_integer(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def key_id(key: Ed25519PublicKey) -> str:
    """Return the `kid` of a key: the first 16 hex digits of its SHA-256."""
    return hashlib.sha256(key.public_bytes_raw()).hexdigest()[:16]


def public_key_text(key: Ed25519PublicKey) -> str:
    """Return a public key in the form of the settings."""
    return _PREFIX + base64.urlsafe_b64encode(key.public_bytes_raw()).decode().rstrip("=")


def _read_public_key(text: str) -> Ed25519PublicKey:
    encoded = text.removeprefix(_PREFIX)
    try:
        raw = base64.urlsafe_b64decode(encoded + "=" * (-len(encoded) % 4))
        return Ed25519PublicKey.from_public_bytes(raw)
    except (ValueError, binascii.Error):
        raise SettingsError(
            f"licence.public_keys: {text[:24]!r} is not a public key: give one that 'limiter licence keygen' prints"
        ) from None
