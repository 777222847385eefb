"""The RateLimit headers of a balance, and the part of it that can be spent."""

from collections.abc import Mapping

from limiter.credits.models import Balance, Tier


def ratelimit_headers(balance: Balance) -> dict[str, str]:
    """Return RateLimit-Policy and RateLimit in the syntax of draft-ietf-httpapi-ratelimit-headers-11.

    A lifetime quota has no window and no reset. A policy without a limit has no item; without items there is no header.
    """
    window = "" if balance.period_s is None else f";w={balance.period_s}"
    reset = "" if balance.renews_in_s is None else f";t={balance.renews_in_s}"
    credits_left, gemini_left = spendable(balance)
    policy, left = [], []
    if balance.quota is not None:
        policy.append(f'"credits";q={balance.quota}{window}')
        left.append(f'"credits";r={credits_left}{reset}')
    if balance.gemini_cap is not None:
        policy.append(f'"gemini";q={balance.gemini_cap}{window}')
        left.append(f'"gemini";r={gemini_left}{reset}')
    return {"RateLimit-Policy": ", ".join(policy), "RateLimit": ", ".join(left)} if policy else {}


def with_rate(headers: Mapping[str, str], tier: Tier, wait_s: int) -> dict[str, str]:
    """Return RateLimit headers with the item of a tier's rate, which is used up for so many seconds.

    Its window is the time in which a whole burst is there again.
    """
    if tier.rate_ms is None or tier.burst_ms is None:
        return dict(headers)
    rate = {
        "RateLimit-Policy": f'"rate";q={tier.burst_ms // tier.rate_ms};w={-(-tier.burst_ms // 1000)}',
        "RateLimit": f'"rate";r=0;t={wait_s}',
    }
    return {name: ", ".join(filter(None, (headers.get(name), item))) for name, item in rate.items()}


def spendable(balance: Balance) -> tuple[int | None, int | None]:
    """Return the credits and the Gemini credits that no live hold covers; None where there is no limit.

    A hold counts against both, as it can still be committed on either backend.
    """
    credits_left, gemini_left, held = balance.remaining, balance.gemini_remaining, balance.held
    return (
        None if credits_left is None else max(0, credits_left - held),
        None if gemini_left is None else max(0, gemini_left - held),
    )
