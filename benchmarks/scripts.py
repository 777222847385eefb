"""Server cost of a decision: reserve and commit against a skeleton pair, by redis-benchmark, in interleaved rounds.

Run it as `python -m benchmarks.scripts`. It needs Debian's redis-tools, and starts a server of its own.
"""

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from redis import Redis

from limiter.lua_source import compose
from tests.servers import Server, binaries

ROUNDS = 7
ROWS = 200_000
REQUESTS = 60_000
HOLD_ID = "0123456789abcdef0123456789abcdef"
KEY = "credits:install:__rand_int__"  # redis-benchmark puts 12 digits below ROWS here
FILL = """
for i = tonumber(ARGV[1]), tonumber(ARGV[2]) do
  local key = string.format("credits:install:%012d", i)
  redis.call("DEL", key)
  redis.call("HSET", key, "tier_snapshot", "pro", "lifetime_consumed", 3, "lifetime_gemini_consumed", 2,
    "monthly_consumed", 5, "monthly_gemini_consumed", 3, "last_renewal_at", ARGV[4], "last_active_at", ARGV[4],
    "anniversary_day", 11)
  if ARGV[3] ~= "" then
    redis.call("HSET", key, "hold:" .. ARGV[5], "gemini pro monthly 1 " .. ARGV[3], "held", "1 0 0 0 1 1 " .. ARGV[3])
  end
end
"""


def fill(redis: "Redis", *, held: bool) -> None:
    """Make every row anew, each with a live hold or none, so that no round finds what another left."""
    lapses = str(int(time.time() * 1000) + 3_600_000) if held else ""
    began = time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime(time.time() - 86_400))
    for first in range(0, ROWS, 10_000):
        redis.eval(FILL, 0, str(first), str(first + 9_999), lapses, began, HOLD_ID)


def throughput(port: int, sha: str, *arguments: str) -> float:
    """Give requests per second of one EVALSHA on random rows."""
    command = ["redis-benchmark", "-p", str(port), "-c", "50", "-P", "16", "--csv"]
    command += ["-n", str(REQUESTS), "-r", str(ROWS), "EVALSHA", sha, "1", KEY]
    answer = subprocess.run(  # noqa: S603  our own words
        [*command, *arguments], capture_output=True, text=True, check=True
    )
    return float(answer.stdout.splitlines()[-1].split(",")[1].strip('"'))


def main() -> None:
    """Measure, and print a table of medians with their spread."""
    binary = binaries()[sys.argv[1] if len(sys.argv) > 1 else "valkey"]
    if binary is None:
        sys.exit("that server is not installed")
    reserve = (HOLD_ID[:20] + "__rand_int__", "pro", "monthly", "1000000", "400000", "", "1", "1", "600000", "1", "")
    commit = (HOLD_ID, "", "", "core", "")
    skeleton = Path(__file__).parent / "skeleton"
    with tempfile.TemporaryDirectory() as folder:
        server = Server(binary, Path(folder), "--appendonly", "no").start()
        redis = Redis(port=server.port)
        print(f"{binary.name} {redis.info().get('valkey_version') or redis.info()['redis_version']}, {ROUNDS} rounds")
        for name, arguments, held in (("reserve", reserve, False), ("commit", commit, True)):
            ours, floor = compose(name).sha, str(redis.script_load((skeleton / f"{name}.lua").read_text()))
            redis.script_load(compose(name).text)
            pairs = []
            for _ in range(ROUNDS):
                fill(redis, held=held)
                below = throughput(server.port, floor, *arguments)
                fill(redis, held=held)
                pairs.append((throughput(server.port, ours, *arguments), below))
            ratios = [mine / below for mine, below in pairs]
            print(
                f"{name:8} {statistics.median(mine for mine, _ in pairs):8.0f}/s"
                f"   skeleton {statistics.median(below for _, below in pairs):8.0f}/s"
                f"   ratio {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
            )
        redis.close()
        server.stop()


if __name__ == "__main__":
    main()
