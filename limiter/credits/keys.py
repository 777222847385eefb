"""The one place that spells Redis keys, and validates install ids.

The keys of rows, `install`, never expire. Every other key has a TTL, and contains only install ids, digests and
addresses, none of which can make it another key.
"""

import hashlib
import re

from limiter.errors import InvalidInstallId, SettingsError

# No brace, or the id would choose the cluster slot; no glob character, or it would match other rows in a SCAN.
_INSTALL_ID = re.compile(r"[A-Za-z0-9._-]{1,64}", re.ASCII)
_STORED_AS_IT_IS = re.compile(r"[a-z0-9._-]{1,64}", re.ASCII)
_UUID = re.compile(r"[0-9A-Fa-f]{8}(-[0-9A-Fa-f]{4}){3}-[0-9A-Fa-f]{12}", re.ASCII)
_PREFIX = re.compile(r"[A-Za-z0-9._:-]{1,32}", re.ASCII)


def is_uuid(text: str) -> bool:
    """Return whether the text is a UUID in its usual 36 characters, in any case."""
    return _UUID.fullmatch(text) is not None


def normalise_install_id(install_id: str) -> str:
    """Return the id as it is stored: a UUID in lower case, anything else as it is.

    Raises InvalidInstallId unless it has 1 to 64 characters of `A-Z a-z 0-9 . _ -`.
    """
    if _STORED_AS_IT_IS.fullmatch(install_id):  # nearly all
        return install_id
    if _UUID.fullmatch(install_id):
        return install_id.lower()
    if not _INSTALL_ID.fullmatch(install_id):
        raise InvalidInstallId(
            f"install id {install_id[:80]!r} is not usable: send 1 to 64 characters of A-Z a-z 0-9 . _ -"
        )
    return install_id


class Keys:
    """The keys under one prefix."""

    __slots__ = ("_install", "install_pattern", "prefix")

    def __init__(self, prefix: str = "credits") -> None:
        if not _PREFIX.fullmatch(prefix):
            raise SettingsError(
                f"redis.prefix {prefix!r} is not usable: give 1 to 32 characters of A-Z a-z 0-9 . _ : -"
            )
        self.prefix = prefix
        self._install = f"{prefix}:install:"
        self.install_pattern = f"{prefix}:install:*"

    def install(self, install_id: str) -> str:
        """Return the key of an install's row. Raises InvalidInstallId."""
        return self._install + normalise_install_id(install_id)

    def install_id(self, key: str) -> str:
        """Return the install id of the key of a row."""
        return key.removeprefix(self._install)

    def claim(self, install_id: str, idempotency_key: str) -> str:
        """Return the key of the outcome of an install's `Idempotency-Key`. Raises InvalidInstallId."""
        return f"{self.prefix}:claim:{normalise_install_id(install_id)}:{_digest(idempotency_key)}"

    def sdk_retry(self, install_id: str, fingerprint: str) -> str:
        """Return the key of the outcome of an install's latest request with a fingerprint. Raises InvalidInstallId."""
        return f"{self.prefix}:retry:{normalise_install_id(install_id)}:{fingerprint}"

    def kept(self, install_id: str | None = None) -> str:
        """Return the key that counts the bytes of an install's kept answers, or of all. Raises InvalidInstallId."""
        return f"{self.prefix}:kept" + (f":{normalise_install_id(install_id)}" if install_id else "")

    def seats(self, subject: str) -> str:
        """Return the key of the seats of a licence's subject, which may be any text."""
        return f"{self.prefix}:seats:{_digest(subject)}"

    def revoked(self) -> str:
        """Return the key of the list of revoked licences."""
        return f"{self.prefix}:revoked"

    def probe(self) -> str:
        """Return a key that does not exist, to probe a user's permissions."""
        return f"{self.prefix}:doctor"

    def mint(self, network: str | None) -> str:
        """Return the key that counts the new installs of a network, or of all; in a cluster they share a slot."""
        return f"{self.prefix}:{{mint}}:{network or 'all'}"

    def pruned(self) -> str:
        """Return the key of the notes of how many rows were pruned lately."""
        return f"{self.prefix}:pruned"

    def lease(self) -> str:
        """Return the key of the persisters' lease."""
        return f"{self.prefix}:persister"

    def import_lease(self) -> str:
        """Return the key of the lease that lets only one import run at a time."""
        return f"{self.prefix}:import"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:40]
