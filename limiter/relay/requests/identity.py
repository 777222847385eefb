"""Identification of the client: install id and tier, from the headers. A tier that a client claims is never trusted."""

from typing import NamedTuple

from aiohttp import hdrs, web
from multidict import istr

from limiter.credits.keys import is_uuid
from limiter.credits.models import CORE, Tiers
from limiter.licences.tokens import InvalidLicence, Licence, Licences, RevokedLicence
from limiter.relay.http.problems import fail

_BEARER = "bearer "
_INSTALL_ID = istr("X-Install-Id")
_DOTS = 2  # in a signed token


class Identity(NamedTuple):
    """An install, the tier that it is served as, and its licence if it has one."""

    install_id: str
    tier: str
    licence: Licence | None

    def headers(self) -> dict[str, str]:
        """Return the header that tells a client that it is served as core, as its licence has expired."""
        return {"X-Licence": "expired"} if self.licence is not None and self.licence.expired else {}


def identify(request: web.Request, licences: Licences, tiers: Tiers) -> Identity:
    """Return the identity in `X-Install-Id` and `Authorization: Bearer`.

    The Bearer token is a licence, or, for clients without one, may be the install id.

    Raises ProblemRaised: 400 for a missing or invalid install id, 401 for a token that is no valid licence, or
    a revoked one.
    """
    token = _bearer(request)
    install_ids = {each.strip().lower() for each in request.headers.getall(_INSTALL_ID, ())}
    if len(install_ids) > 1:
        fail(400, "invalid_install_id", "Invalid install id", "Send only one X-Install-Id: there are several.")
    install_id = install_ids.pop() if install_ids else ""
    licence: Licence | None = None
    if token and is_uuid(token):
        install_id = install_id or token
    elif token:
        try:
            licence = licences.check(token)
        except RevokedLicence:
            detail = "This licence was revoked. Ask its issuer for another one, or send your install id alone."
            fail(401, "licence_revoked", "Licence revoked", detail)
        except InvalidLicence as error:
            cause = error if token.count(".") == _DOTS else "The Bearer token is neither a UUID nor a licence"
            fail(
                401,
                "invalid_licence",
                "Invalid licence",
                f"{cause}. Send a licence, or your install id, as the Bearer token.",
            )
    if not install_id:
        fail(400, "missing_install_id", "Missing install id", "Send your install id, a UUID, as X-Install-Id.")
    if not is_uuid(install_id):
        fail(400, "invalid_install_id", "Invalid install id", "X-Install-Id must be a UUID of 36 characters.")
    return Identity(install_id.lower(), _tier(licence, tiers), licence)


def _bearer(request: web.Request) -> str:
    authorization = request.headers.get(hdrs.AUTHORIZATION, "")
    return authorization[len(_BEARER) :].strip() if authorization.lower().startswith(_BEARER) else ""


def _tier(licence: Licence | None, tiers: Tiers) -> str:
    if licence is None or licence.expired:
        return CORE
    if licence.tier not in tiers:
        fail(
            401,
            "unknown_tier",
            "Unknown tier",
            f"The licence is for a tier {licence.tier!r}, which is not offered here.",
        )
    return licence.tier
