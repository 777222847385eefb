"""Licences: what is signed by the operator's key is believed, nothing else."""

import base64
import json
import time

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1
from cryptography.hazmat.primitives.asymmetric.ec import generate_private_key as generate_ec_key

from limiter.errors import SettingsError
from limiter.licences.keys import issue
from limiter.licences.tokens import InvalidLicence, Licence, Licences, key_id, public_key_text
from tests.support.licences import DAY_S, KEY, OTHER_KEY, PUBLIC_KEY, by_hand, claims, licence_for, signed


@pytest.fixture
def licences() -> Licences:
    return Licences([PUBLIC_KEY])


def test_licence_when_issued_then_it_has_the_claims_that_were_given(licences: Licences) -> None:
    before_s = int(time.time())
    licence = licences.check(issue(KEY, tier="pro", subject="alice@example.org", valid_s=DAY_S, installs=3))
    assert (licence.tier, licence.subject, licence.installs, licence.expired) == ("pro", "alice@example.org", 3, False)
    assert before_s + DAY_S <= licence.expires_s <= int(time.time()) + DAY_S
    assert licence.kid == key_id(KEY.public_key())


def test_licence_when_expired_then_it_says_so(licences: Licences) -> None:
    assert licences.check(licence_for("pro", KEY, valid_s=-DAY_S)).expired


def test_licence_when_just_expired_then_a_clock_may_be_half_a_minute_off(licences: Licences) -> None:
    assert not licences.check(licence_for("pro", KEY, valid_s=-20)).expired
    assert licences.check(licence_for("pro", KEY, valid_s=-31)).expired


def test_licence_when_it_expires_after_a_check_then_the_next_one_says_so(
    licences: Licences, monkeypatch: pytest.MonkeyPatch
) -> None:
    token, then_s = licence_for("pro", KEY), time.time() + DAY_S + 31
    assert not licences.check(token).expired
    monkeypatch.setattr(time, "time", lambda: then_s)
    assert licences.check(token).expired


def test_licence_when_it_is_refused_then_it_is_refused_again(licences: Licences) -> None:
    token = licence_for("pro", OTHER_KEY)
    for _ in range(2):
        with pytest.raises(InvalidLicence):
            licences.check(token)


def test_keys_when_rotated_then_licences_of_both_are_valid() -> None:
    both = Licences([public_key_text(OTHER_KEY.public_key()), PUBLIC_KEY])
    assert both.check(licence_for("pro", KEY)).kid == key_id(KEY.public_key())
    assert both.check(licence_for("max", OTHER_KEY)).tier == "max"
    with pytest.raises(InvalidLicence):
        Licences([public_key_text(OTHER_KEY.public_key())]).check(licence_for("pro", KEY))


def test_licence_when_it_names_no_kid_then_each_key_is_tried() -> None:
    both = Licences([public_key_text(OTHER_KEY.public_key()), PUBLIC_KEY])
    assert both.check(signed(claims())).tier == "pro"


@pytest.mark.parametrize(
    "token",
    [
        pytest.param(signed(claims(), OTHER_KEY), id="another key"),
        pytest.param(signed(claims(), OTHER_KEY, kid=key_id(KEY.public_key())), id="another key under our kid"),
        pytest.param(signed(claims(), kid="0123456789abcdef"), id="an unknown kid"),
        pytest.param(signed(claims(), kid=""), id="an empty kid"),
        pytest.param(by_hand({"alg": "none"}, claims()), id="alg none"),
        pytest.param(by_hand({"alg": "None", "kid": key_id(KEY.public_key())}, claims()), id="alg None"),
        pytest.param(by_hand({"alg": "EdDSA"}, claims()), id="no signature"),
        pytest.param(by_hand({"alg": "EdDSA"}, claims(), b"\0" * 64), id="a signature of zeros"),
        pytest.param(signed(claims(), KEY.public_key().public_bytes_raw(), "HS256"), id="HS256 with the public key"),
        pytest.param(signed(claims(), PUBLIC_KEY.encode(), "HS256"), id="HS256 with the public key's text"),
        pytest.param(signed(claims(), generate_ec_key(SECP256R1()), "ES256"), id="ES256"),
        pytest.param(signed(claims(iat=int(time.time()) + 3600)), id="issued in an hour"),
        pytest.param(signed(claims(nbf=int(time.time()) + 3600)), id="not before an hour"),
        *(
            pytest.param(
                signed({name: value for name, value in claims().items() if name != missing}), id=f"no {missing}"
            )
            for missing in ("tier", "sub", "exp", "iat")
        ),
        pytest.param(signed(claims(tier=5)), id="tier is a number"),
        pytest.param(signed(claims(tier=["pro"])), id="tier is a list"),
        pytest.param(signed(claims(exp="soon")), id="exp is text"),
        pytest.param(signed(claims(exp=True)), id="exp is true"),
        pytest.param(signed(claims(iat="now")), id="iat is text"),
        pytest.param(signed(claims(installs=0)), id="for no installs"),
        pytest.param(signed(claims(installs=True)), id="for true installs"),
        pytest.param(signed(claims(installs="3")), id="for installs in text"),
        pytest.param("", id="nothing"),
        pytest.param("garbage", id="garbage"),
        pytest.param("a.b.c", id="three letters"),
        pytest.param("..", id="two dots"),
        pytest.param(".".join(["eyJhbGciOiJFZERTQSJ9"] * 5), id="five parts"),
        pytest.param(by_hand("text", claims()), id="a header that is text"),
        pytest.param(by_hand({"alg": "EdDSA", "kid": {"a": 1}}, claims()), id="a kid that is an object"),
        pytest.param(by_hand({"alg": ["EdDSA"]}, claims()), id="an alg that is a list"),
        pytest.param(
            base64.urlsafe_b64encode(b'{"a":' + b"[" * 2990).decode() + ".e30.AA", id="a deeply nested header"
        ),
        pytest.param("\udcff.\udcfe.a", id="no ASCII"),
        pytest.param("eyJhbGciOiJFZERTQSJ9.é.a", id="an accent"),
        pytest.param(signed(claims(more="x" * 4096)), id="too long"),
    ],
)
def test_licence_when_it_is_not_valid_then_it_is_rejected(licences: Licences, token: str) -> None:
    with pytest.raises(InvalidLicence):
        licences.check(token)


def test_licence_when_a_claim_is_changed_then_invalid(licences: Licences) -> None:
    header, payload, signature = licence_for("pro", KEY).split(".")
    changed = json.loads(base64.urlsafe_b64decode(payload + "==")) | {"tier": "max"}
    forged = base64.urlsafe_b64encode(json.dumps(changed).encode()).decode().rstrip("=")
    with pytest.raises(InvalidLicence):
        licences.check(f"{header}.{forged}.{signature}")


def test_licence_when_there_are_no_keys_then_none_is_valid() -> None:
    with pytest.raises(InvalidLicence):
        Licences([]).check(licence_for("pro", KEY))


def test_error_when_a_licence_is_invalid_then_it_does_not_quote_it(licences: Licences) -> None:
    token = signed(claims(), OTHER_KEY)
    with pytest.raises(InvalidLicence) as raised:
        licences.check(token)
    assert token[:20] not in str(raised.value)


@pytest.mark.parametrize(
    "text",
    ["", "ed25519:", "ed25519:AAAA", "ed25519:" + "é" * 43, PUBLIC_KEY[:-3], PUBLIC_KEY + "AAAA"],
    ids=["empty", "nothing", "too short", "not ASCII", "cut", "too long"],
)
def test_public_key_when_it_is_not_valid_then_settings_error(text: str) -> None:
    with pytest.raises(SettingsError, match=r"^licence\.public_keys: "):
        Licences([text])


def test_public_key_when_a_private_one_is_given_then_the_error_does_not_quote_it() -> None:
    pem = KEY.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    ).decode()
    secret = pem.splitlines()[1]
    for text in (pem, secret):
        with pytest.raises(SettingsError) as raised:
            Licences([text])
        assert secret[24:] not in str(raised.value)
        assert secret[16:32] not in str(raised.value)


def other_spellings(token: str) -> list[str]:
    """The same three parts for a lax decoder: padded, with what it skips, with the bits that it drops."""
    last = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
    twin = last[last.index(token[-1]) + 1]
    return [f"{token}=", f"{token}==", f"{token}====", f"{token}!", f"{token[:-9]} {token[-9:]}", token[:-1] + twin]


def test_licence_when_it_is_spelled_otherwise_then_it_is_refused_and_takes_no_place(licences: Licences) -> None:
    token = licence_for("pro", KEY)
    licences.check(token)
    for spelling in other_spellings(token):
        with pytest.raises(InvalidLicence):
            licences.check(spelling)
    assert licences._known.cache_info().currsize == 1


def test_token_when_it_was_refused_then_it_is_not_verified_again_for_a_while(
    licences: Licences, monkeypatch: pytest.MonkeyPatch
) -> None:
    verified: list[str] = []
    verify = licences._verify

    def count(token: str, licence_id: str) -> Licence:
        verified.append(token)
        return verify(token, licence_id)

    monkeypatch.setattr(licences, "_verify", count)
    forged = signed(claims(), OTHER_KEY)
    refusals = set()
    for _ in range(5):
        with pytest.raises(InvalidLicence) as raised:
            licences.check(forged)
        refusals.add(str(raised.value))
    assert (len(verified), len(refusals)) == (1, 1)
    then_s = time.monotonic() + 61
    monkeypatch.setattr(time, "monotonic", lambda: then_s)
    with pytest.raises(InvalidLicence):
        licences.check(forged)
    assert len(verified) == 2


def test_tokens_when_very_many_are_refused_then_memory_is_bounded(
    licences: Licences, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("limiter.licences.tokens._MAX_REFUSED", 50)
    forged = signed(claims(), OTHER_KEY)
    for number in range(200):
        with pytest.raises(InvalidLicence):
            licences.check(f"{forged[:-10]}{number:09}A")
    assert len(licences._refused) <= 50


def test_licence_when_it_is_not_valid_yet_then_that_is_not_remembered(licences: Licences) -> None:
    token = signed(claims(nbf=int(time.time()) + 31))
    with pytest.raises(InvalidLicence):
        licences.check(token)
    assert licences._refused == {}


def test_licence_when_its_id_is_compared_then_each_has_its_own(licences: Licences) -> None:
    tokens = [licence_for("pro", KEY, valid_s=DAY_S + number) for number in range(5)]
    ids = {licences.check(token).id for token in tokens}
    assert len(ids) == 5
    assert all(len(each) == 32 and int(each, 16) for each in ids)
