"""Licences: EdDSA-signed JWTs that say which tier an install has paid for, checked offline.

A public key is written `ed25519:<base64url>`; its `kid` is the start of its SHA-256, so that keys can be rotated.
"""

import base64
import binascii
import hashlib
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TypeGuard

import jwt
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from limiter.errors import LimiterError, SettingsError

_PREFIX = "ed25519:"
_ALGORITHM = "EdDSA"
_LEEWAY_S = 30  # clocks of the issuer and of the relays may differ by this much
_MAX_TOKEN = 4096
_MAX_KNOWN = 1024  # licences that need not be verified again: a few megabytes at most
_LAST_S = 253_402_300_799  # the last second of the year 9999


class InvalidLicence(LimiterError):  # noqa: N818  names the thing, as UnknownTier does
    """The token is no licence of ours: wrong signature, key, algorithm or claims."""


@dataclass(frozen=True, slots=True)
class Licence:
    """What a licence says. expires_s: epoch seconds. installs: how many installs may use it, None for any number."""

    tier: str
    subject: str
    expires_s: int
    installs: int | None
    kid: str
    expired: bool


class Licences:
    """Checks licences against the operator's public keys."""

    def __init__(self, public_keys: Sequence[str]) -> None:
        self._keys: dict[str, Ed25519PublicKey] = {}
        for text in public_keys:
            key = _read_public_key(text)
            self._keys[key_id(key)] = key
        self._known = lru_cache(maxsize=_MAX_KNOWN)(self._read)

    def check(self, token: str) -> Licence:
        """Give what the licence says; an expired one is given with `expired` set. Raises InvalidLicence."""
        licence = self._known(token)
        return replace(licence, expired=True) if licence.expires_s + _LEEWAY_S <= time.time() else licence

    def _read(self, token: str) -> Licence:
        """Verify and read a licence, whether or not it has expired: the only thing in it that changes with time."""
        if len(token) > _MAX_TOKEN:
            raise InvalidLicence(f"the licence is longer than {_MAX_TOKEN} characters")
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
                algorithms=[_ALGORITHM],
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
        raise InvalidLicence("the licence is not valid: its exp is no date")
    return Licence(tier, subject, expires_s, installs, kid, expired=False)


def _is_integer(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def key_id(key: Ed25519PublicKey) -> str:
    """Give the `kid` of a key: the first 16 hex digits of its SHA-256."""
    return hashlib.sha256(key.public_bytes_raw()).hexdigest()[:16]


def public_key_text(key: Ed25519PublicKey) -> str:
    """Give a public key as the settings take it."""
    return _PREFIX + base64.urlsafe_b64encode(key.public_bytes_raw()).decode().rstrip("=")


def make_key(path: Path) -> Ed25519PrivateKey:
    """Make a private key and store it as PEM, for its owner only. Never overwrites. Raises SettingsError."""
    key = Ed25519PrivateKey.generate()
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    try:
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as handle:
            handle.write(pem)
    except FileExistsError:
        raise SettingsError(f"{path} exists already: a private key is never overwritten") from None
    except OSError as error:
        raise SettingsError(f"{path} cannot be written: {error.strerror}") from None
    return key


def read_key(path: Path) -> Ed25519PrivateKey:
    """Read such a private key. Raises SettingsError."""
    try:
        key = serialization.load_pem_private_key(path.read_bytes(), password=None)
    except OSError as error:
        raise SettingsError(f"the private key {path} cannot be read: {error.strerror}") from None
    except (ValueError, TypeError):
        raise SettingsError(f"{path} is no private key: make one with 'limiter licence keygen'") from None
    if not isinstance(key, Ed25519PrivateKey):
        raise SettingsError(f"{path} is not an Ed25519 key: make one with 'limiter licence keygen'")
    return key


def issue(key: Ed25519PrivateKey, *, tier: str, subject: str, valid_s: int, installs: int | None = None) -> str:
    """Sign a licence that is valid from now for `valid_s` seconds."""
    now_s = int(time.time())
    claims: dict[str, object] = {"tier": tier, "sub": subject, "iat": now_s, "exp": now_s + valid_s}
    if installs is not None:
        claims["installs"] = installs
    return jwt.encode(claims, key, algorithm=_ALGORITHM, headers={"kid": key_id(key.public_key())})


def _read_public_key(text: str) -> Ed25519PublicKey:
    encoded = text.removeprefix(_PREFIX)
    try:
        raw = base64.urlsafe_b64decode(encoded + "=" * (-len(encoded) % 4))
        return Ed25519PublicKey.from_public_bytes(raw)
    except (ValueError, binascii.Error):
        raise SettingsError(
            f"licence.public_keys: {text[:24]!r} is no key: give the line that 'limiter licence keygen' prints"
        ) from None
