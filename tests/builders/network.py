"""Two hosts on one machine: network namespaces joined by a virtual cable, which can be cut.

Needs root (or the right to make namespaces) and the command ``ip``. Nothing in them reaches any other
network; they are gone when the block ends.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from types import TracebackType
from typing import Self


class Hosts:
    """The two hosts; entering makes them."""

    def __init__(self) -> None:
        self._names = [f"apr{os.getpid()}h{host}" for host in (0, 1)]
        self._interfaces = [f"apr{os.getpid() % 100000}v{host}" for host in (0, 1)]

    def __enter__(self) -> Self:
        try:
            for name in self._names:
                _ip("netns", "add", name)
            first, second = self._interfaces
            _ip(
                "link",
                "add",
                first,
                "netns",
                self._names[0],
                "type",
                "veth",
                "peer",
                second,
                "netns",
                self._names[1],
            )
            for host, name in enumerate(self._names):
                _ip("-n", name, "address", "add", f"{self.address(host)}/24", "dev", self._interfaces[host])
                _ip("-n", name, "link", "set", self._interfaces[host], "up")
                _ip("-n", name, "link", "set", "lo", "up")
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for name in self._names:
            pids = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True, check=False)
            for pid in pids.stdout.split():
                subprocess.run(["kill", "-9", pid], capture_output=True, check=False)
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)

    def address(self, host: int) -> str:
        """IPv4 address of a host."""
        return f"10.77.0.{host + 1}"

    def interface(self, host: int) -> str:
        """Its end of the cable."""
        return self._interfaces[host]

    def inside(self, host: int) -> list[str]:
        """What goes before a command to run it on a host."""
        return ["ip", "netns", "exec", self._names[host]]

    def cut(self) -> None:
        """Pull the cable."""
        _ip("-n", self._names[0], "link", "set", self._interfaces[0], "down")


def why_no_hosts() -> str | None:
    """Why hosts cannot be made here, or None."""
    if shutil.which("ip") is None:
        return "the command ip is not there (Debian: iproute2)"
    name = f"apr{os.getpid()}try"
    tried = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
    if tried.returncode:
        return f"network namespaces are not allowed here ({tried.stderr.strip()})"
    subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)
    return None


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)
