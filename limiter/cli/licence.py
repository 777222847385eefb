"""`limiter licence`: creates a key pair, issues, shows and revokes licences, lists and frees their seats."""

import math
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from limiter._util.timestamps import iso_from_ms
from limiter.bootstrap import open_session
from limiter.cli._console import (
    ERRORS,
    OUT,
    ConfigOption,
    JsonOption,
    RedisOption,
    print_json,
    print_table,
    read_settings,
    run,
)
from limiter.config.settings import Settings
from limiter.credits.keys import normalise_install_id
from limiter.errors import LimiterError, UnknownTier
from limiter.licences.keys import issue, make_key, read_key
from limiter.licences.revocations import MAX_REVOKED, Revocation, Revocations, RevocationStatus
from limiter.licences.seats import Seat, Seats
from limiter.licences.tokens import InvalidLicence, Licence, Licences, is_spelled_as_licence, public_key_text
from limiter.redis.replication import wait_for_replicas

app = typer.Typer(help="Licences: signed tokens that state which tier an install has paid for.", no_args_is_help=True)
_DAY_S = 86_400
WhichArgument = Annotated[
    str, typer.Argument(metavar="SUB_OR_ID", help="A customer's `sub`; or one licence: its id, or the licence itself.")
]
KeyOption = Annotated[Path, typer.Option("--key", metavar="FILE", help="The file of the private key.")]


@app.command()
def keygen(key: KeyOption = Path("licence-key.pem")) -> None:
    """Create a private key, and print the public one for the settings.

    Example: limiter licence keygen --key licence-key.pem
    """
    public = public_key_text(make_key(key).public_key())
    OUT.print(
        f"The private key is in {key}: keep it safe, it signs licences.\nFor limiter.toml of every relay:\n",
        soft_wrap=True,
    )
    OUT.print(f'[licence]\npublic_keys = ["{public}"]', markup=False, soft_wrap=True)


@app.command("issue")
def issue_(
    tier: Annotated[str, typer.Option(help="A tier of the settings, such as 'pro'.")],
    subject: Annotated[str, typer.Option("--sub", help="The customer, by a name or id of yours.")],
    key: KeyOption = Path("licence-key.pem"),
    days: Annotated[float, typer.Option(min=0.001, max=36_500, help="How long the licence is valid.")] = 31,
    installs: Annotated[
        str, typer.Option(metavar="N|any", help="How many installs may use it, each with the tier's quota.")
    ] = "1",
    config: ConfigOption = None,
) -> None:
    """Print a new licence, which clients send as `Authorization: Bearer`. Its id goes to stderr.

    It is for one install, unless --installs says otherwise.

    Example: limiter licence issue --tier pro --sub alice@example.org --days 31
    """
    if not subject.strip():
        raise typer.BadParameter("--sub must not be empty: the seats of a licence are counted by it")
    if math.isnan(days):
        raise typer.BadParameter("--days must be a number")
    tiers = read_settings(config).limits()
    if tier not in tiers:
        raise UnknownTier(f"unknown tier {tier!r}: the configured ones are {', '.join(tiers)}")
    signing, limit = read_key(key), _installs(installs)
    token = issue(signing, tier=tier, subject=subject, valid_s=round(days * _DAY_S), installs=limit)
    typer.echo(token)
    licence = Licences([public_key_text(signing.public_key())]).check(token)
    number = "any number of installs" if limit is None else "1 install" if limit == 1 else f"{limit} installs"
    ERRORS.print(f"The licence {licence.id} is for {number}.", markup=False, soft_wrap=True)


def _installs(text: str) -> int | None:
    if text == "any":
        return None
    if not (text.isascii() and text.isdigit()) or int(text) < 1:
        raise typer.BadParameter("--installs must be a whole number above 0, or 'any'")
    return int(text)


@app.command()
def show(
    token: Annotated[str, typer.Argument(help="The licence.")], config: ConfigOption = None, json: JsonOption = False
) -> None:
    """Check a licence against the public keys of the settings, and print its content.

    Example: limiter licence show eyJhbGciOi…
    """
    settings = read_settings(config)
    licence = _checked(settings, token.strip())
    document = {
        "id": licence.id,
        "tier": licence.tier,
        "sub": licence.subject,
        "expires_at": iso_from_ms(licence.expires_s * 1000),
        "expired": licence.expired,
        "installs": licence.installs,
        "kid": licence.kid,
        "known_tier": licence.tier in settings.limits(),
    }
    if json:
        print_json(document)
        return
    for name, value in document.items():
        OUT.print(f"{name:<11} {'any number' if value is None else value}", markup=False)


def _checked(settings: Settings, token: str) -> Licence:
    if not settings.licence.public_keys:
        raise LimiterError("licence.public_keys is not set: no licence can be checked")
    try:
        return Licences(settings.licence.public_keys).check(token)
    except InvalidLicence as error:
        raise LimiterError(str(error)) from None


@app.command()
def revoke(which: WhichArgument, redis: RedisOption = None, config: ConfigOption = None) -> None:
    """Revoke all licences of a customer, or one licence. Relays refuse them within two seconds.

    By a customer's `sub`, licences that are issued later are revoked as well, until `limiter licence restore`. `limiter
    licence issue` and `limiter licence show` print the id of a licence.

    Example: limiter licence revoke alice@example.org
    """
    run(_revoke(read_settings(config, redis=redis), which))


async def _revoke(settings: Settings, which: str) -> None:
    name, expires_s = _name_and_expiry(settings, which)
    async with open_session(settings) as session, wait_for_replicas(session.redis, settings.redis.wait_replicas):
        if await Revocations(session).revoke(name, expires_s=expires_s) is RevocationStatus.FULL:
            raise LimiterError(
                f"{MAX_REVOKED:,} customers and licences are revoked already: restore some of them first"
            )
    OUT.print(f"{name} is revoked.", markup=False, soft_wrap=True)


@app.command()
def restore(which: WhichArgument, redis: RedisOption = None, config: ConfigOption = None) -> None:
    """Undo `limiter licence revoke`. Relays accept the licences again within two seconds.

    Example: limiter licence restore alice@example.org
    """
    run(_restore(read_settings(config, redis=redis), which))


async def _restore(settings: Settings, which: str) -> None:
    name, _ = _name_and_expiry(settings, which)
    async with open_session(settings) as session, wait_for_replicas(session.redis, settings.redis.wait_replicas):
        if await Revocations(session).restore(name) is RevocationStatus.GONE:
            raise LimiterError(f"{name} is not revoked")
    OUT.print(f"{name} is restored.", markup=False, soft_wrap=True)


def _name_and_expiry(settings: Settings, which: str) -> tuple[str, int | None]:
    """Return what is revoked, a subject or an id, and when it expires, in epoch seconds, where that is known."""
    if not which.strip():
        raise typer.BadParameter("give a customer's 'sub', or the id of a licence")
    if not is_spelled_as_licence(which.strip()):
        return which, None
    licence = _checked(settings, which.strip())
    return licence.id, licence.expires_s


@app.command()
def revoked(redis: RedisOption = None, config: ConfigOption = None, json: JsonOption = False) -> None:
    """List the customers and the licences that are revoked, the last one first.

    Example: limiter licence revoked
    """
    run(_revoked(read_settings(config, redis=redis), as_json=json))


async def _revoked(settings: Settings, *, as_json: bool) -> None:
    async with open_session(settings) as session:
        _print_revoked(await Revocations(session).list(), as_json=as_json)


def _print_revoked(entries: list[Revocation], *, as_json: bool) -> None:
    rows = [
        {
            "revoked": entry.name,
            "revoked_at": iso_from_ms(entry.revoked_ms),
            "forgotten_at": None if entry.expires_ms is None else iso_from_ms(entry.expires_ms),
        }
        for entry in entries
    ]
    if as_json:
        print_json({"revoked": rows})
        return
    if not rows:
        OUT.print("No licence is revoked.")
        return
    table = Table("revoked", "at", "forgotten at", box=None, pad_edge=False)
    for row in rows:
        table.add_row(row["revoked"], row["revoked_at"], row["forgotten_at"] or "never")
    print_table(table)


@app.command()
def seats(
    subject: Annotated[str, typer.Argument(metavar="SUB", help="The customer: the `sub` of the licence.")],
    free: Annotated[str | None, typer.Option(metavar="INSTALL", help="Free the seat of this install first.")] = None,
    redis: RedisOption = None,
    config: ConfigOption = None,
    json: JsonOption = False,
) -> None:
    """List the installs that use a licence with a limited number of installs, the last used first.

    A freed install that still has the licence takes a seat again if its next request arrives before another install's;
    a relay may serve it for up to a minute after its seat was freed.

    Example: limiter licence seats alice@example.org --free 5f0c1c1e-8d3a-4a53-9a0e-0d8f2f6f3c11
    """
    run(_seats(read_settings(config, redis=redis), subject, free, as_json=json))


async def _seats(settings: Settings, subject: str, free: str | None, *, as_json: bool) -> None:
    replicas = 0 if free is None else settings.redis.wait_replicas
    async with open_session(settings) as session, wait_for_replicas(session.redis, replicas):
        seats = Seats(session)
        if free is not None and not await seats.free(subject, normalise_install_id(free)):
            raise LimiterError(f"{free} has no seat of {subject}")
        _print_seats(subject, await seats.list(subject), as_json=as_json)


def _print_seats(subject: str, taken: list[Seat], *, as_json: bool) -> None:
    if as_json:
        print_json(
            {
                "sub": subject,
                "seats": [
                    {
                        "install_id": seat.install_id,
                        "seated_at": iso_from_ms(seat.seated_ms),
                        "used_at": iso_from_ms(seat.used_ms),
                    }
                    for seat in taken
                ],
            }
        )
        return
    if not taken:
        OUT.print(f"No install has a seat of {subject}.", markup=False)
        return
    table = Table("install", "seated at", "last used at", box=None, pad_edge=False)
    for seat in taken:
        table.add_row(seat.install_id, iso_from_ms(seat.seated_ms), iso_from_ms(seat.used_ms))
    print_table(table)
