"""Private keys: made once, for their owner alone, and read as they were made."""

from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1
from cryptography.hazmat.primitives.asymmetric.ec import generate_private_key as generate_ec_key

from limiter.errors import SettingsError
from limiter.licences.keys import make_key, read_key


def test_key_when_made_then_its_owner_alone_reads_it_and_it_is_never_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "key.pem"
    made = make_key(path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert read_key(path).private_bytes_raw() == made.private_bytes_raw()
    with pytest.raises(SettingsError, match="never overwritten"):
        make_key(path)
    assert read_key(path).private_bytes_raw() == made.private_bytes_raw()


def test_key_when_the_folder_is_missing_then_settings_error(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="cannot be written"):
        make_key(tmp_path / "none" / "key.pem")
    with pytest.raises(SettingsError, match="cannot be read"):
        read_key(tmp_path / "key.pem")


def test_key_when_the_file_is_not_a_private_key_then_settings_error(tmp_path: Path) -> None:
    path = tmp_path / "key.pem"
    path.write_text("no key")
    with pytest.raises(SettingsError, match="not a private key"):
        read_key(path)
    pem = generate_ec_key(SECP256R1()).private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    path.write_bytes(pem)
    with pytest.raises(SettingsError, match="not an Ed25519 key"):
        read_key(path)
