"""Parse Redis URLs: the kind of topology, its addresses, and the plain URL of each of its servers.

It connects to nothing, and puts no password into an error.
"""

import re
from dataclasses import dataclass
from typing import Literal
from urllib.parse import parse_qsl, quote, unquote, urlencode

from limiter.errors import SettingsError

Kind = Literal["single", "sentinel", "cluster"]
_FORMS = (
    "redis://USER:PASSWORD@HOST:PORT/DB, rediss://… for TLS, unix://PATH, "
    "redis+sentinel://HOST:PORT,HOST:PORT/NAME/DB, redis+cluster://HOST:PORT,HOST:PORT "
    "or embedded:FOLDER, with / : @ # ? of a password percent-encoded"
)
_SCHEMES: dict[str, tuple[Kind, str]] = {
    "redis": ("single", "redis"),
    "rediss": ("single", "rediss"),
    "unix": ("single", "unix"),
    "redis+sentinel": ("sentinel", "redis"),
    "rediss+sentinel": ("sentinel", "rediss"),
    "redis+cluster": ("cluster", "redis"),
    "rediss+cluster": ("cluster", "rediss"),
}
_DEFAULT_PORT: dict[Kind, int] = {"single": 6379, "sentinel": 26379, "cluster": 6379}
_PLACE = re.compile(r"(?P<host>\[[0-9A-Fa-f:.]+\]|[^:\[\]]+)(:(?P<port>\d{1,5}))?", re.ASCII)
# A secret in a query, up to the next option: what is not percent-encoded in it belongs to it, too.
_PASSWORD = re.compile(r"(?:(?<=password=)|(?<=[?&]key=)|(?<=[?&]sig=)).*?(?=&[a-z_]+=|$)", re.DOTALL)
_NAME_OPTIONS = ("username=", "client_name=", "sentinel_username=")
_SENTINEL_LOGIN = ("sentinel_username", "sentinel_password")
_MAX_PORT = 65_535


@dataclass(frozen=True, slots=True)
class Address:
    """Where one server listens."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True, slots=True, repr=False)
class Topology:
    """A parsed URL.

    Args:
        kind: of the servers; a single one is not parsed here.
        scheme: of the plain URL of each server.
        login: user and password with the @ after them, or "".
        seeds: the Sentinels, or some nodes of the cluster.
        name: what the Sentinels call the primary.
        database: its number, or "".
        query: the options after the question mark.
    """

    kind: Kind
    scheme: str
    login: str
    seeds: tuple[Address, ...]
    name: str
    database: str
    query: tuple[tuple[str, str], ...]

    def url_of(self, address: Address) -> str:
        """Return the plain URL of one server that holds rows."""
        query = [(key, value) for key, value in self.query if key not in _SENTINEL_LOGIN]
        return self._url(self.login, address, self.database, query)

    def sentinel_url_of(self, address: Address) -> str:
        """Return the plain URL of a Sentinel, which has credentials of its own and no databases."""
        options = dict(self.query)
        user, password = (quote(options.get(key, ""), safe="") for key in _SENTINEL_LOGIN)
        query = [(key, value) for key, value in self.query if key.startswith("ssl_")]
        return self._url(f"{user}:{password}@" if user or password else "", address, "", query)

    def _url(self, login: str, address: Address, database: str, query: list[tuple[str, str]]) -> str:
        return f"{self.scheme}://{login}{address}/{database}" + (f"?{urlencode(query)}" if query else "")


def parse_url(url: str) -> Topology | None:
    """Return the topology of a URL of several servers; None for one of a single server, which redis-py parses itself.

    Raises SettingsError, which shows the forms of a URL, for one that is not valid.
    """
    scheme, separator, rest = url.partition("://")
    if scheme not in _SCHEMES or not separator:
        raise invalid_url(url)
    kind, plain = _SCHEMES[scheme]
    if plain != "unix" and _has_split_password(rest):
        raise invalid_url(url)
    if kind == "single":
        return None
    rest, _, query = rest.partition("?")
    login, at, place = rest.rpartition("@")
    hosts, *path = place.rstrip("/").split("/")
    if login.count(":") > 1 or "/" in login or len(path) > (2 if kind == "sentinel" else 0):
        raise invalid_url(url)
    name = unquote(path[0]) if path else ""
    database = path[1] if len(path) > 1 else ""
    if (kind == "sentinel" and not name) or not (database == "" or database.isdecimal()):
        raise invalid_url(url)
    seeds = tuple(_address(host, kind, url) for host in hosts.split(","))
    return Topology(kind, plain, login + at, seeds, name, database, tuple(parse_qsl(query)))


def _has_split_password(rest: str) -> bool:
    """Return whether a `/`, `?` or `#` of a password ended it: its start is taken for a host then, its rest for a path.

    Errors about that host would show a part of it. An @ behind the address can otherwise only be an option's.
    """
    parts = re.split(r"[/?#]", rest, maxsplit=1)
    behind = _PASSWORD.sub("", parts[1]) if len(parts) > 1 else ""
    path, *options = re.split(r"[?&]", behind)
    if "/" not in rest.partition("?")[0].partition("#")[0] and "?" in rest:
        path, options = "", [path, *options]  # there is no path: the first part is an option already
    return "@" in path or any("@" in option and not option.startswith(_NAME_OPTIONS) for option in options)


def invalid_url(url: str) -> SettingsError:
    """Return the error for a text that is not a valid Redis URL."""
    return SettingsError(f"{redacted(url)!r} is not a valid Redis URL: give {_FORMS}")


def redacted(url: str) -> str:
    """Return the URL without its passwords, for logs and errors; it need not be valid."""
    scheme, separator, rest = url.partition("://")
    login, at, place = _PASSWORD.sub("***", rest).rpartition("@")
    user = login.partition(":")[0] + ":***" if ":" in login else login
    return scheme + separator + user + at + place


def passwords_of(url: str) -> list[str]:
    """Return the passwords in a URL, to be masked in logs: each as it is written there, and decoded."""
    rest = url.partition("://")[2]
    login = _PASSWORD.sub("", rest).rpartition("@")[0]
    written = [login.partition(":")[2], *_PASSWORD.findall(rest)]
    return [text for each in written if each for text in (each, unquote(each))]


def _address(text: str, kind: Kind, url: str) -> Address:
    found = _PLACE.fullmatch(text)
    port = int(found["port"] or _DEFAULT_PORT[kind]) if found else 0
    if not found or not 0 < port <= _MAX_PORT:
        raise invalid_url(url)
    return Address(unquote(found["host"].strip("[]")), port)
