"""Denied decisions as HTTP errors: one error object for each reason."""

from collections.abc import Mapping
from typing import NoReturn

from limiter.credits.models import Balance, Decision, Reason, Tier
from limiter.relay.http.problems import Problem, ProblemRaised
from limiter.relay.http.ratelimit_headers import ratelimit_headers, with_rate


def refuse(decision: Decision, tier: Tier, headers: Mapping[str, str]) -> NoReturn:
    """Raise ProblemRaised for a denied decision. tier: the one that the request was decided for."""
    balance = decision.balance
    limits = ratelimit_headers(balance)
    if decision.reason is Reason.RATE_LIMITED:
        wait_s = max(1, -(-decision.rate_wait_ms // 1000))
        raise ProblemRaised(_rate_limited(tier, wait_s), {**with_rate(limits, tier, wait_s), **headers})
    problem = _REFUSALS[decision.reason or Reason.OUT_OF_CREDITS](balance)
    raise ProblemRaised(problem, {**limits, **headers})


def _out_of_credits(balance: Balance) -> Problem:
    until = f"They renew at {balance.renews_at}." if balance.renews_at else "This tier's credits do not renew."
    return Problem(
        402,
        Reason.OUT_OF_CREDITS,
        "Out of credits",
        f"This install has used the credits of its tier {balance.tier!r}. {until}",
        may_retry=False,
        renews_at=balance.renews_at,
        violated_policies=("credits",),
    )


def _gemini_cap(balance: Balance) -> Problem:
    return Problem(
        402,
        Reason.GEMINI_CAP,
        "Gemini credits used up",
        f"This install has used the Gemini credits of its tier {balance.tier!r}, and nothing else here serves this.",
        may_retry=False,
        renews_at=balance.renews_at,
        violated_policies=("gemini",),
    )


def _credits_in_flight(balance: Balance) -> Problem:
    return Problem(
        429,
        Reason.CREDITS_IN_FLIGHT,
        "Credits in flight",
        f"{balance.held} credits are held by requests that are still running: send this one again when they are done.",
        retry_after_s=1,
    )


def _too_many_in_flight(balance: Balance) -> Problem:
    return Problem(
        429,
        Reason.TOO_MANY_IN_FLIGHT,
        "Too many requests in flight",
        f"This install already runs as many requests at once as its tier {balance.tier!r} allows.",
        retry_after_s=1,
    )


def _rate_limited(tier: Tier, wait_s: int) -> Problem:
    return Problem(
        429,
        Reason.RATE_LIMITED,
        "Rate limited",
        f"This install sends more than the {tier.rate_per_min} requests a minute of its tier {tier.name!r}.",
        retry_after_s=wait_s,
    )


_REFUSALS = {
    Reason.OUT_OF_CREDITS: _out_of_credits,
    Reason.GEMINI_CAP: _gemini_cap,
    Reason.CREDITS_IN_FLIGHT: _credits_in_flight,
    Reason.TOO_MANY_IN_FLIGHT: _too_many_in_flight,
}
