"""Real Sentinel and Cluster set-ups for the tests, of the same binaries as the single servers of `servers`.

Each starts its servers on free ports of this machine and forms the set-up itself, so that a test can break it.
"""

import contextlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from redis import Redis

from tests.support.redis_servers import Server, free_port
from tests.support.wait import wait_until

SLOTS = 16384
_FORM_S = 30.0


@contextmanager
def plain_client(server: Server) -> Iterator["Redis"]:
    """A plain client of one server, for the set-up and for a test's own look at it."""
    with Redis(port=server.port, decode_responses=True, socket_timeout=5) as client:
        yield client


def execute(server: Server, *words: str | int) -> Any:
    """Run one command on one server."""
    with plain_client(server) as client:
        return command(client, *words)


def command(client: "Redis", *words: str | int) -> Any:
    """Run a command whose reply is wanted as it comes."""
    return client.execute_command(*words)  # type: ignore[no-untyped-call]  # redis-py 8.1


class SentinelServer(Server):
    """A process in Sentinel mode; it writes what it finds out into its configuration."""

    def __init__(self, binary: Path, folder: Path, *settings: str) -> None:
        super().__init__(binary, folder)
        self.settings = settings

    def words(self) -> list[str]:
        file = self.folder / "sentinel.conf"
        if not file.exists():
            lines = [f"port {self.port}", "bind 127.0.0.1", f"dir {self.folder}", "logfile server.log", *self.settings]
            file.write_text("\n".join(lines) + "\n")
        return [str(self.binary), str(file), "--sentinel"]


class SentinelSetUp:
    """A primary, two replicas and three Sentinels that watch them. down_after_ms: of silence, and it is replaced."""

    NAME = "mymaster"

    def __init__(self, binary: Path, folder: Path, *extra: str, down_after_ms: int = 60_000) -> None:
        self.servers = [
            Server(binary, folder / f"server-{number}", "--appendfsync", "no", *extra) for number in range(3)
        ]
        primary = self.servers[0]
        for replica in self.servers[1:]:
            replica.extra += ("--replicaof", f"127.0.0.1 {primary.port}", "--repl-diskless-sync-delay", "0")
        watch = (
            f"sentinel monitor {self.NAME} 127.0.0.1 {primary.port} 2",
            f"sentinel down-after-milliseconds {self.NAME} {_FORM_S * 2000:.0f}",
            f"sentinel failover-timeout {self.NAME} {max(2_000, 4 * down_after_ms)}",
        )
        self._down_after_ms = down_after_ms
        self.sentinels = [SentinelServer(binary, folder / f"sentinel-{number}", *watch) for number in range(3)]

    @property
    def url(self) -> str:
        places = ",".join(f"127.0.0.1:{sentinel.port}" for sentinel in self.sentinels)
        return f"redis+sentinel://{places}/{self.NAME}"

    def start(self) -> "SentinelSetUp":
        for server in (*self.servers, *self.sentinels):
            server.start()
        wait_until(self._is_whole, within_s=_FORM_S, what="the Sentinels' knowing all of each other")
        for sentinel in self.sentinels:  # only now: on a busy machine they would replace it while they form
            execute(sentinel, "SENTINEL", "SET", self.NAME, "down-after-milliseconds", self._down_after_ms)
        return self

    def primary(self) -> Server:
        """The server that most Sentinels take for the primary."""
        ports = [self._primary_port(sentinel) for sentinel in self.sentinels if sentinel.process]
        port = max(set(ports), key=ports.count)
        return next(server for server in self.servers if server.port == port)

    def kill(self) -> None:
        for server in (*self.sentinels, *self.servers):
            server.kill()

    def _primary_port(self, sentinel: Server) -> int:
        return int(execute(sentinel, "SENTINEL", "GET-MASTER-ADDR-BY-NAME", self.NAME)[1])

    def _is_whole(self) -> bool:
        return all(self._knows_all(sentinel) for sentinel in self.sentinels) and all(
            execute(server, "ROLE")[3] == "connected" for server in self.servers[1:]
        )

    def _knows_all(self, sentinel: Server) -> bool:
        with plain_client(sentinel) as client:
            known: Any = client.sentinel_master(self.NAME)
        return bool(known["num-other-sentinels"] == 2 and known["num-slaves"] == 2)


class ClusterSetUp:
    """Primaries that share the slots evenly, and their replicas. node_timeout_ms: of silence, and one is replaced."""

    def __init__(
        self,
        binary: Path,
        folder: Path,
        *extra: str,
        primaries: int = 3,
        replicas: int = 3,
        node_timeout_ms: int = 60_000,
    ) -> None:
        self._binary, self._folder, self._primaries = binary, folder, primaries
        self._extra = (
            *("--cluster-enabled", "yes", "--cluster-config-file", "nodes.conf", "--appendfsync", "no"),
            *("--cluster-node-timeout", str(node_timeout_ms), "--repl-diskless-sync-delay", "0", *extra),
        )
        self.servers = [self._server(number) for number in range(primaries + replicas)]

    @property
    def url(self) -> str:
        """It names two nodes, from which the others must be found out."""
        return "redis+cluster://" + ",".join(f"127.0.0.1:{server.port}" for server in self.servers[:2])

    def start(self) -> "ClusterSetUp":
        for server in self.servers:
            server.start()
        heads = self.servers[: self._primaries]
        for number, head in enumerate(heads):
            first, last = number * SLOTS // len(heads), (number + 1) * SLOTS // len(heads) - 1
            execute(head, "CLUSTER", "ADDSLOTSRANGE", first, last)
            execute(head, "CLUSTER", "SET-CONFIG-EPOCH", number + 1)
        for number, server in enumerate(self.servers):
            self._meet(server, self.servers[:number])
        wait_until(self._all_know_all, within_s=_FORM_S, what="the cluster's nodes knowing each other")
        for number, replica in enumerate(self.servers[self._primaries :]):
            execute(replica, "CLUSTER", "REPLICATE", self.id_of(heads[number % len(heads)]))
        wait_until(self.is_well, within_s=_FORM_S, what="the cluster's being whole")
        return self

    def add_node(self) -> Server:
        """Start one more primary, with no slots, and wait until all know it."""
        server = self._server(len(self.servers)).start()
        self._meet(server, self.servers)
        self.servers.append(server)
        wait_until(self._all_know_all, within_s=_FORM_S, what="the cluster's knowing its new node")
        wait_until(self.is_well, within_s=_FORM_S, what="the new node's knowing all slots")
        return server

    def id_of(self, server: Server) -> str:
        return str(execute(server, "CLUSTER", "MYID"))

    def primaries(self) -> list[Server]:
        """The servers that own slots, as the first one that runs sees it."""
        return [self._by_port(int(shard[2][1])) for shard in self._slot_table()]

    def owner_of(self, slot: int) -> Server:
        for first, last, owner, *_ in self._slot_table():
            if first <= slot <= last:
                return self._by_port(int(owner[1]))
        raise AssertionError(f"nobody owns slot {slot}")

    def is_well(self) -> bool:
        """Whether every node that runs serves all slots, and every replica has its data."""
        for server in self.servers:
            if server.process:
                with plain_client(server) as client:
                    info: Any = client.cluster("INFO")
                    role = command(client, "ROLE")
                if info["cluster_state"] != "ok" or (role[0] == "slave" and role[3] != "connected"):
                    return False
        return True

    def kill(self) -> None:
        for server in self.servers:
            server.kill()

    def _server(self, number: int) -> Server:
        server = Server(self._binary, self._folder / f"node-{number}", *self._extra)
        server.extra += ("--cluster-port", str(free_port()))
        return server

    def _meet(self, server: Server, others: list[Server]) -> None:
        for other in others:  # all of them: the news would take seconds to spread
            # With tls-cluster a node is met at its TLS port: it is what the others tell clients who come by TLS.
            port = other.extra[other.extra.index("--tls-port") + 1] if "--tls-port" in other.extra else other.port
            execute(server, "CLUSTER", "MEET", "127.0.0.1", port, other.extra[-1])

    def _by_port(self, port: int) -> Server:
        return next(server for server in self.servers if server.port == port)

    def _slot_table(self) -> list[Any]:
        for server in self.servers:
            if server.process:
                with contextlib.suppress(OSError), plain_client(server) as client:
                    return list(command(client, "CLUSTER", "SLOTS"))
        raise AssertionError("no node runs")

    def _all_know_all(self) -> bool:
        return all(
            execute(server, "CLUSTER", "NODES").count(" connected") == len(self.servers) for server in self.servers
        )
