"""What one request may ask for beside its credit: its model, answers, inputs and output tokens.

A bound is looked at where the client sends its member; nothing is put into a body. What is over a bound is refused, or
only counted and logged, as the operator likes.
"""

import re
from collections.abc import Collection, Mapping
from functools import lru_cache
from typing import NamedTuple

import msgspec
import orjson
from aiohttp import web
from msgspec import Raw

from limiter.relay.http.problems import REQUEST_ID, Problem, ProblemRaised
from limiter.relay.requests.json_members import Members
from limiter.relay.telemetry.over_bounds import BoundName, OverBounds

_OUTPUT_TOKENS = ("max_tokens", "max_completion_tokens", "max_output_tokens")
_ANSWERS = ("n", "best_of")
_INPUTS = {"/v1/embeddings": "input", "/v1/completions": "prompt"}
_TOKENS = re.compile(rb"\[[\s0-9,.eE+-]*\]")  # one input, as the numbers of its tokens
_MAX_DIGITS = 40


class TierBounds(NamedTuple):
    """The bounds of one tier; 0 is none.

    Attributes:
        max_n: answers to one request (`n`, `best_of`).
        max_inputs: texts in one request for embeddings, and prompts in one for completions.
        max_output_tokens: the largest number of output tokens that a request may name, by any of its members.
    """

    max_n: int = 4
    max_inputs: int = 256
    max_output_tokens: int = 32_768


class Bounds:
    """The bounds of all tiers.

    Args:
        tiers: those of each; a tier that is not there has the defaults.
        models: the only ones that are served; None for any.
        over_bounds: is told of each request over a bound, which is refused if bounds are enforced.
    """

    def __init__(
        self,
        tiers: Mapping[str, TierBounds],
        models: Collection[str] | None,
        over_bounds: OverBounds,
    ) -> None:
        self._tiers, self._default = tiers, TierBounds()
        self._models = None if models is None else frozenset(models)
        self._over_bounds, self._refuses = over_bounds, over_bounds.enforces

    @property
    def every_model_counts(self) -> bool:
        """Whether a request whose model cannot be told is to be refused."""
        return self._models is not None and self._refuses

    def serves(self, model: str) -> bool:
        """Return whether a request for a model is not refused for that."""
        return self._models is None or not self._refuses or model in self._models

    def check(self, request: web.Request, tier: str, members: Members) -> None:
        """Check a JSON request. Raises ProblemRaised: 400, or 404 for its model."""
        self.check_model(request, members.model)
        bounds = self._tiers.get(tier, self._default)
        for name in _ANSWERS:
            if _is_over(getattr(members, name), bounds.max_n):
                self._over(request, "max_n", name, bounds.max_n)
        for name in _OUTPUT_TOKENS:
            if _is_over(getattr(members, name), bounds.max_output_tokens):
                self._over(request, "max_output_tokens", name, bounds.max_output_tokens)
        inputs = _INPUTS.get(request.path)
        if inputs is not None and _has_more_items(getattr(members, inputs), bounds.max_inputs):
            self._over(request, "max_inputs", inputs, bounds.max_inputs)

    def check_model(self, request: web.Request, model: str) -> None:
        """Check the model of a request. Raises ProblemRaised (404)."""
        if self._models is None or model in self._models:
            return
        self._over_bounds.note("models", request[REQUEST_ID])
        if self._refuses:
            detail = "This relay serves only the models that its operator has listed: GET /v1/models shows them."
            raise ProblemRaised(Problem(404, "model_not_found", "Model not found", detail, param="model"))

    def _over(self, request: web.Request, bound: BoundName, member: str, limit: int) -> None:
        self._over_bounds.note(bound, request[REQUEST_ID])
        if self._refuses:
            what = "items" if bound == "max_inputs" else "as a number"
            detail = f"{member!r} may be up to {limit} {what} in this tier ({bound}): send less."
            raise ProblemRaised(Problem(400, "request_over_bound", "Request over a bound", detail, param=member))


def _is_over(raw: Raw, bound: int) -> bool:
    """Return whether a number is over a bound. A text of one is taken for it, as some backends do, and no number is."""
    text = bytes(raw) if bound and raw else b"null"
    if text == b"null":
        return False
    try:
        return len(text) > _MAX_DIGITS or not float(orjson.loads(text)) <= bound
    except (TypeError, ValueError, OverflowError):
        return True


def _has_more_items(raw: Raw, bound: int) -> bool:
    """Return whether a value is a list of more items than a bound, other than a list of tokens, without building it."""
    text = memoryview(raw)
    if not bound or bytes(text[:1]) != b"[":
        return False
    try:
        _counter(bound).decode(text)
    except msgspec.ValidationError:
        return _TOKENS.fullmatch(text) is None
    return False


@lru_cache(maxsize=64)
def _counter(most: int) -> "msgspec.json.Decoder[object]":
    """Return what reads a list of up to so many items, and fails at one more."""
    fields = [(f"item_{number}", Raw, Raw()) for number in range(most)]
    items = msgspec.defstruct("Items", fields, array_like=True, forbid_unknown_fields=True, gc=False)
    return msgspec.json.Decoder(items)
