"""TCP lines between the ranks beside the collectives: rank 0 listens, every other rank holds one connection.

The kernel keeps the connection: it ends at once when a process dies, however it dies, within
``SILENCE_S`` when a host or its link is gone, and never because a process is slow or stopped. What is
said over it, and what follows from it, is in ``watch``. Lines are JSON; nothing is pickled.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import secrets
import socket
from collections.abc import Sequence
from typing import Any

from apr_dist.errors import DistributedError

SILENCE_S = 8
"""A host whose kernel has not answered for this long is gone."""

CONNECT_S = 20.0
"""Longest that joining may take: the listener is up before anybody hears of it."""

LARGEST_LINE = 1 << 16
"""A line beyond this is not one of ours."""


class Line:
    """One connection, as whole JSON lines."""

    def __init__(self, connection: socket.socket) -> None:
        self.socket = connection
        self._pending = b""
        _keep_alive(connection)

    def send(self, message: dict[str, Any]) -> bool:
        """Send one message; False when the other end is gone."""
        try:
            self.socket.sendall(json.dumps(message).encode() + b"\n")
        except OSError:
            return False
        return True

    def receive(self) -> list[dict[str, Any]] | None:
        """The messages that have come in; None when the other end is gone or speaks otherwise."""
        try:
            data = self.socket.recv(LARGEST_LINE)
        except (BlockingIOError, TimeoutError):
            return []
        except OSError:
            return None
        *lines, self._pending = (self._pending + data).split(b"\n")
        if not data or len(self._pending) > LARGEST_LINE:
            return None
        try:
            messages = [json.loads(line) for line in lines]
        except ValueError:
            return None
        return messages if all(isinstance(message, dict) for message in messages) else None

    def close(self) -> None:
        """Hang up."""
        self.socket.close()


def listen() -> tuple[socket.socket, dict[str, Any]]:
    """Rank 0's listener, and what the others need to find it: addresses, port and a word to show."""
    _allow_connections()
    if socket.has_dualstack_ipv6():
        listener = socket.create_server(("", 0), family=socket.AF_INET6, backlog=4096, dualstack_ipv6=True)
    else:
        listener = socket.create_server(("", 0), backlog=4096)
    launcher = os.environ.get("MASTER_ADDR", "localhost")
    candidates = [_address_towards(launcher), launcher, socket.gethostname()]
    contact = {"addresses": list(dict.fromkeys(candidates)), "port": listener.getsockname()[1]}
    return listener, {**contact, "word": secrets.token_hex(16)}


def connect(contact: dict[str, Any], *, rank: int) -> Line:
    """This rank's connection to rank 0.

    Raises:
        DistributedError: none of rank 0's addresses answers.
    """
    addresses: Sequence[str] = contact["addresses"]
    for address in addresses:
        with contextlib.suppress(OSError):
            timeout = CONNECT_S / len(addresses)
            line = Line(socket.create_connection((address, contact["port"]), timeout=timeout))
            line.socket.settimeout(SILENCE_S)
            line.send({"kind": "hello", "rank": rank, "word": contact["word"]})
            if line.receive() == [{"kind": "welcome", "word": contact["word"]}]:
                return line
            line.close()  # another program of another host, at an address that means this host
    raise DistributedError(
        f"rank {rank} cannot reach rank 0 at {' or '.join(addresses)}, port {contact['port']}",
        expected="TCP connections between the hosts, on any port",
        remedy="open the ports between the hosts, as gloo and NCCL need them too",
    )


def _address_towards(host: str) -> str:
    """This host's own address on the way to ``host``."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:  # connecting a datagram socket sends nothing; it only chooses the route
            probe.connect((host, 9))
            return str(probe.getsockname()[0])
        except OSError:
            return socket.gethostname()


def _allow_connections() -> None:
    """A connection per rank is more than the usual 1,024 open files from about a thousand ranks on."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 65536 if hard == resource.RLIM_INFINITY else min(hard, 65536)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _keep_alive(connection: socket.socket) -> None:
    """Let the kernel notice a host that is gone, whether or not anything is being sent."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (
        ("TCP_KEEPIDLE", 2),
        ("TCP_KEEPINTVL", 2),
        ("TCP_KEEPCNT", SILENCE_S // 2),
        ("TCP_USER_TIMEOUT", SILENCE_S * 1000),
    ):
        if hasattr(socket, name):  # Linux has all of them
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
