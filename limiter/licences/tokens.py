"""Verify licences: EdDSA-signed JWTs with the tier that an install has paid for, checked offline.

A public key is written `ed25519:<base64url>`; its `kid` is the start of its SHA-256, so that keys can be rotated.
This is what every relay does; `keys` makes keys and issues licences, and no relay has a private key.
"""

import base64
import binascii
import hashlib
import time
from collections.abc import Sequence
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
_LAST_S = 253_402_300_799  # the last second of the year 9999


class InvalidLicence(LimiterError):  # noqa: N818  names the thing, as UnknownTier does
    """The token is not a valid licence: wrong signature, key, algorithm or claims."""


@dataclass(frozen=True, slots=True)
class Licence:
    """The claims of a licence. expires_s: epoch seconds. installs: how many installs may use it; None: any number."""

    tier: str
    subject: str
    expires_s: int
    installs: int | None
    kid: str
    expired: bool


class Licences:
    """The operator's public keys, which verify licences."""

    def __init__(self, public_keys: Sequence[str]) -> None:
        self._keys: dict[str, Ed25519PublicKey] = {}
        for text in public_keys:
            key = _read_public_key(text)
            self._keys[key_id(key)] = key
        self._known = lru_cache(maxsize=_MAX_KNOWN)(self._read)

    def check(self, token: str) -> Licence:
        """Return the claims of a licence, with `expired` set if it has expired. Raises InvalidLicence."""
        licence = self._known(token)
        return replace(licence, expired=True) if licence.expires_s + _LEEWAY_S <= time.time() else licence

    def _read(self, token: str) -> Licence:
        """Verify and read a licence, whether or not it has expired: the only thing in it that changes with time."""
        if len(token) > _MAX_TOKEN_LENGTH:
            raise InvalidLicence(f"the licence is longer than {_MAX_TOKEN_LENGTH} characters")
        if not token.isascii():
            raise InvalidLicence("the licence is not valid: it has a character that no licence has")
        try:
            kid = jwt.get_unverified_header(token).get("kid")
            candidates = [self._keys[kid]] if kid in self._keys else list(self._keys.values()) if kid is None else []
            claims = _verified(token, candidates)
        except (jwt.PyJWTError, RecursionError) as error:  # the latter from a header of nothing but brackets
            raise InvalidLicence(f"the licence is not valid: {error}") from None
        return _licence(claims, kid or "")


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


def _licence(claims: dict[str, object], kid: str) -> Licence:
    tier, subject, expires_s, installs = claims["tier"], claims["sub"], claims["exp"], claims.get("installs")
    if not isinstance(tier, str) or not isinstance(subject, str) or not _is_integer(expires_s):
        raise InvalidLicence("the licence is not valid: tier and sub must be text, exp a whole number")
    if installs is not None and (not _is_integer(installs) or installs < 1):
        raise InvalidLicence("the licence is not valid: installs must be a whole number above 0")
    if not 0 <= expires_s <= _LAST_S:
        raise InvalidLicence("the licence is not valid: its exp is not a date")
    return Licence(tier, subject, expires_s, installs, kid, expired=False)


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
