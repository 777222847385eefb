"""Which servers and topologies the tests run on; two variables of the environment choose others."""

import os

ELSEWHERE = "LIMITER_TEST_REDIS_URL"  # a URL here points the tests at a server that they do not start; it is flushed
# Where all tests run, instead of what follows: "sentinel,cluster", or with Debian's binary "redis-sentinel".
TOPOLOGY = "LIMITER_TEST_TOPOLOGY"
MATRIX = (
    ["elsewhere"] if ELSEWHERE in os.environ else os.environ.get(TOPOLOGY, "valkey,redis,sentinel,cluster").split(",")
)
