"""The operator's side of licences: create and read private keys, and sign licences with them. No relay needs it."""

import os
import time
from pathlib import Path

import jwt
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from limiter.errors import SettingsError
from limiter.licences.tokens import ALGORITHM, key_id


def make_key(path: Path) -> Ed25519PrivateKey:
    """Create a private key and store it as PEM for its owner only. Raises SettingsError, also if the file exists."""
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
    """Read a private key that `make_key` stored. Raises SettingsError."""
    try:
        key = serialization.load_pem_private_key(path.read_bytes(), password=None)
    except OSError as error:
        raise SettingsError(f"the private key {path} cannot be read: {error.strerror}") from None
    except (ValueError, TypeError):
        raise SettingsError(f"{path} is not a private key: make one with 'limiter licence keygen'") from None
    if not isinstance(key, Ed25519PrivateKey):
        raise SettingsError(f"{path} is not an Ed25519 key: make one with 'limiter licence keygen'")
    return key


def issue(key: Ed25519PrivateKey, *, tier: str, subject: str, valid_s: int, installs: int | None = 1) -> str:
    """Sign a licence that is valid from now for `valid_s` seconds. installs: how many may use it; None: any number."""
    now_s = int(time.time())
    claims: dict[str, object] = {"tier": tier, "sub": subject, "iat": now_s, "exp": now_s + valid_s}
    if installs is not None:
        claims["installs"] = installs
    return jwt.encode(claims, key, algorithm=ALGORITHM, headers={"kid": key_id(key.public_key())})
