"""Licences for the tests: two keys, tokens that `limiter licence` would issue, and tokens that nobody should."""

import base64
import json
import time
from typing import Any

import jwt
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from limiter.licences.keys import issue
from limiter.licences.tokens import public_key_text

KEY, OTHER_KEY = Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()
PUBLIC_KEY = public_key_text(KEY.public_key())
DAY_S = 86_400


def licence_for(tier: str, key: Ed25519PrivateKey, *, valid_s: int = DAY_S) -> str:
    return issue(key, tier=tier, subject="someone", valid_s=valid_s, installs=None)


def claims(**more: Any) -> dict[str, Any]:
    now_s = int(time.time())
    return {"tier": "pro", "sub": "someone", "iat": now_s, "exp": now_s + DAY_S} | more


def signed(payload: dict[str, Any], key: Any = KEY, algorithm: str = "EdDSA", **header: Any) -> str:
    return jwt.encode(payload, key, algorithm=algorithm, headers=header)


def by_hand(header: object, payload: object, signature: bytes = b"") -> str:
    parts = [json.dumps(header).encode(), json.dumps(payload).encode(), signature]
    return ".".join(base64.urlsafe_b64encode(part).decode().rstrip("=") for part in parts)
