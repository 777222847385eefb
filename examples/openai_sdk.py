"""Calls a relay with OpenAI's SDK for Python: a chat completion, a stream, and what to do when credits run out.

Start a relay in another terminal with `make run`, or set RELAY_URL to one of yours.
"""

import os
import sys

import openai

INSTALL_ID = os.environ.get("INSTALL_ID", "5f0c1c1e-8d3a-4a53-9a0e-0d8f2f6f3c11")  # a UUID that your app keeps

client = openai.OpenAI(
    base_url=os.environ.get("RELAY_URL", "http://127.0.0.1:8080") + "/v1",
    api_key=os.environ.get("LICENCE", INSTALL_ID),  # a licence, or without one the install id
    default_headers={"X-Install-Id": INSTALL_ID},
    max_retries=2,  # a 429 is retried after its Retry-After; a 402 never is
)

try:
    answer = client.chat.completions.with_raw_response.create(
        model="echo", messages=[{"role": "user", "content": "Hello, relay"}]
    )
    print(answer.parse().choices[0].message.content)
    print("credits:", answer.headers["RateLimit"])

    with client.chat.completions.create(
        model="echo", messages=[{"role": "user", "content": "Hello, stream"}], stream=True
    ) as stream:
        print("".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices))
except openai.RateLimitError as error:  # 429: still so after the retries, e.g. many requests of this install run
    sys.exit(f"busy ({error.code}), try again in {error.response.headers['Retry-After']} s")
except openai.APIStatusError as error:
    if error.status_code != 402:  # noqa: PLR2004  Payment Required
        raise
    renews_at = error.response.json()["renews_at"]  # null for a quota that never renews
    sys.exit(f"out of credits ({error.code}), " + (f"they renew at {renews_at}" if renews_at else "they do not renew"))
