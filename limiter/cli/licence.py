"""`limiter licence`: creates a key pair, issues and shows licences, lists and frees their seats."""

import math
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from limiter._util.timestamps import iso_from_ms
from limiter.bootstrap import open_session
from limiter.cli._console import OUT, ConfigOption, JsonOption, RedisOption, print_json, print_table, read_settings, run
from limiter.config.settings import Settings
from limiter.credits.keys import normalise_install_id
from limiter.errors import LimiterError, UnknownTier
from limiter.licences.keys import issue, make_key, read_key
from limiter.licences.seats import Seat, Seats
from limiter.licences.tokens import InvalidLicence, Licences, public_key_text
from limiter.redis.replication import wait_for_replicas

app = typer.Typer(help="Licences: signed tokens that state which tier an install has paid for.", no_args_is_help=True)
_DAY_S = 86_400
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
        int | None, typer.Option(min=1, help="How many installs may use it; unlimited by default.")
    ] = None,
    config: ConfigOption = None,
) -> None:
    """Print a new licence, which clients send as `Authorization: Bearer`.

    Example: limiter licence issue --tier pro --sub alice@example.org --days 31
    """
    if not subject.strip():
        raise typer.BadParameter("--sub must not be empty: the seats of a licence are counted by it")
    if math.isnan(days):
        raise typer.BadParameter("--days must be a number")
    tiers = read_settings(config).limits()
    if tier not in tiers:
        raise UnknownTier(f"unknown tier {tier!r}: the configured ones are {', '.join(tiers)}")
    typer.echo(issue(read_key(key), tier=tier, subject=subject, valid_s=round(days * _DAY_S), installs=installs))


@app.command()
def show(
    token: Annotated[str, typer.Argument(help="The licence.")], config: ConfigOption = None, json: JsonOption = False
) -> None:
    """Check a licence against the public keys of the settings, and print its content.

    Example: limiter licence show eyJhbGciOi…
    """
    settings = read_settings(config)
    if not settings.licence.public_keys:
        raise LimiterError("licence.public_keys is not set: no licence can be checked")
    try:
        licence = Licences(settings.licence.public_keys).check(token.strip())
    except InvalidLicence as error:
        raise LimiterError(str(error)) from None
    document = {
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
