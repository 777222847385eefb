"""Decoding strict JSON: no name twice in an object, and no NaN or Infinity. It knows neither files nor rows.

An integer of any size is an int, another number a Decimal, so that each prints with all its digits.
"""

import json
from collections.abc import Iterable
from decimal import Decimal
from typing import NoReturn

_SHOWN_CHARACTERS = 80


class RefusedJson(Exception):  # noqa: N818  names the thing, as UnknownTier does
    """Valid JSON that no program can rely on. Not a ValueError, which the decoder raises for invalid JSON."""


def _refuse_constant(word: str) -> NoReturn:
    raise RefusedJson(f"{word} is not a JSON number")


def _members(pairs: Iterable[tuple[str, object]]) -> dict[str, object]:
    members: dict[str, object] = {}
    for name, value in pairs:
        if name in members:
            raise RefusedJson(f"the member {name[:_SHOWN_CHARACTERS]!r} is there twice")
        members[name] = value
    return members


DECODER = json.JSONDecoder(parse_float=Decimal, parse_constant=_refuse_constant, object_pairs_hook=_members)
