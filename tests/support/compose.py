"""The services of docker-compose.yml as processes of this machine: the same commands, environment and nginx template.

What a container brings is put in the place of its image: a name becomes a port on 127.0.0.1, a volume a folder.
"""

import os
import re
import shutil
import signal
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from tests.support.cli import LIMITER
from tests.support.paths import ROOT
from tests.support.redis_servers import free_port

COMPOSE = shutil.which("docker-compose")
_NGINX = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
Service = dict[str, Any]


def missing() -> list[str]:
    """What is not installed here and has no package for pip."""
    found = {"docker-compose": COMPOSE, "redis-server": shutil.which("redis-server"), "nginx-light": _NGINX}
    return [name for name, path in found.items() if path is None]


def compose_config(environment: Mapping[str, str], *options: str) -> "subprocess.CompletedProcess[str]":
    """What docker-compose makes of the file, without an engine."""
    assert COMPOSE
    return subprocess.run(
        [COMPOSE, *options, "config"],
        cwd=ROOT,
        env={"PATH": os.environ["PATH"], **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


class Fleet:
    """The default profile, running. `url` is the load balancer's."""

    def __init__(self, folder: Path, environment: Mapping[str, str]) -> None:
        self.folder = folder
        told = compose_config(environment)
        assert told.returncode == 0, told.stderr
        self._services: dict[str, Service] = yaml.safe_load(told.stdout)["services"]
        self.ports = {name: free_port() for name in ("redis", "relay-1", "relay-2", "load-balancer")}
        self.url = f"http://127.0.0.1:{self.ports['load-balancer']}"
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.password = environment["REDIS_PASSWORD"]

    def start(self, name: str) -> None:
        """Start one service, with its output in `<name>.log`."""
        service = self._services[name]
        words = {"redis": self._server, "load-balancer": self._nginx}.get(name, self._limiter)(service)
        environment = {key: self._here(name, str(value)) for key, value in service["environment"].items()}
        cwd = self.folder / name
        cwd.mkdir(exist_ok=True)
        with (self.folder / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                words,
                cwd=cwd,
                env={"PATH": os.environ["PATH"], **environment},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text()

    def end(self, name: str, number: signal.Signals = signal.SIGTERM) -> int:
        """End one service, and give its exit code."""
        process = self.processes.pop(name)
        process.send_signal(number)
        return process.wait(30)

    def close(self) -> None:
        for name in ("load-balancer", "relay-1", "relay-2", "persister", "redis"):
            if name in self.processes:
                # A killed nginx leaves its workers, which go on listening.
                self.end(name, signal.SIGTERM if name == "load-balancer" else signal.SIGKILL)

    def _here(self, name: str, value: str) -> str:
        """Put this machine's addresses and folders in the place of the containers'."""
        for host, port in self.ports.items():
            value = re.sub(rf"\b{host}:(6379|8080)\b", f"127.0.0.1:{port}", value)
        value = value.replace("/data/", f"{self.folder / name}/")
        if name in self.ports and value == "8080":
            return str(self.ports[name])
        return value.replace("172.30.77.250", "127.0.0.1")

    def _server(self, service: Service) -> list[str]:
        shell, option, script = service["command"]
        assert (shell, option) == ("sh", "-c")
        script = script.replace("$$", "$")
        assert "--port 6379" in script
        assert "--dir /data" in script
        script = script.replace("--port 6379", f"--port {self.ports['redis']} --bind 127.0.0.1")
        return [shell, option, script.replace("--dir /data", f"--dir {self.folder / 'redis'}")]

    def _limiter(self, service: Service) -> list[str]:
        return [LIMITER, *service["command"]]

    def _nginx(self, service: Service) -> list[str]:
        """Fill the template in as the image does, and wrap it as the image's own nginx.conf does."""
        source = ROOT / next(text.split(":")[0] for text in service["volumes"] if "templates" in text)
        template = source.read_text()
        values = {key: self._here("load-balancer", str(value)) for key, value in service["environment"].items()} | {
            "LISTEN": f"127.0.0.1:{self.ports['load-balancer']}"
        }
        for key, value in values.items():
            template = template.replace(f"${{{key}}}", value)
        place = self.folder / "load-balancer"
        place.mkdir(exist_ok=True)
        (place / "default.conf").write_text(template)
        paths = "".join(f"{kind}_temp_path {place / kind};\n" for kind in _TEMP_FOLDERS)
        (place / "nginx.conf").write_text(
            f"daemon off; pid {place / 'pid'}; error_log stderr;\n"
            f"events {{ worker_connections 1024; }}\n"
            f"http {{ access_log off;\n{paths}include {place / 'default.conf'};\n}}\n"
        )
        assert _NGINX
        return [_NGINX, "-p", str(place), "-e", "stderr", "-c", str(place / "nginx.conf")]


_TEMP_FOLDERS = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
