"""Connections by which ranks learn of each other's end: every rank to rank 0, and back.

A kernel closes the connections of a process that dies, however it dies, so rank 0 knows within
milliseconds, and so does everybody when rank 0 itself goes. A host that is cut off or loses power
closes nothing: there TCP's own keep-alive gives up after `heartbeat_s`. Kernels answer it, not
programs, so that a rank in a long numpy call, under a debugger or on a laptop that slept is never
taken for dead, as it would be by heartbeats of ours through the process group's store.

Messages are JSON, a line each:

    rank -> 0   {"rank": 3, "host": "b", "token": "..."}  once, first
    both        {"stop": {...}}                           all ranks shall stop
    rank -> 0   {"left": true}                            what ends from here on is no death
"""

from __future__ import annotations

import contextlib
import errno
import json
import socket
import uuid
from typing import Any

import torch.distributed as dist

KEY = "megadistill/circle"
MAX_MESSAGE = 64 * 1024  # bytes: whoever sends more is none of our ranks
SEND_S = 5.0


class Line:
    """Connection that sends and receives whole messages."""

    def __init__(self, connection: socket.socket, heartbeat_s: float) -> None:
        self.connection, self._buffer = connection, b""
        connection.settimeout(SEND_S)
        whole = max(3, round(heartbeat_s))
        for level, option, value in (
            (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
            (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, max(1, whole // 3)),
            (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, max(1, whole // 6)),
            (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 4),
            (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 1000 * whole),
            (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
        ):
            connection.setsockopt(level, option, value)

    def fileno(self) -> int:
        return self.connection.fileno()

    def send(self, message: dict[str, Any]) -> None:
        """Sends, and ignores errors: reading detects a lost connection."""
        with contextlib.suppress(OSError):
            self.connection.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> tuple[list[dict[str, Any]], str | None]:
        """Returns (messages, None or how the connection ended). Call when readable."""
        try:
            data = self.connection.recv(MAX_MESSAGE)
        except OSError as error:
            lost = error.errno in (errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ENETUNREACH)
            return [], "does not answer any more" if lost else "died"
        *lines, self._buffer = (self._buffer + data).split(b"\n")
        if not data or len(self._buffer) > MAX_MESSAGE:
            return _messages(lines), "died"
        return _messages(lines), None

    def close(self) -> None:
        self.connection.close()


def open_hub(store: dist.Store, *, world: int) -> tuple[socket.socket, str]:
    """Rank 0's listening socket, announced in `store`, and the token that callers must know."""
    if socket.has_dualstack_ipv6():
        hub = socket.create_server(
            ("", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=world
        )
    else:
        hub = socket.create_server(("", 0), backlog=world)  # ranks on other hosts call, too
    token = uuid.uuid4().hex
    about = {"host": socket.gethostname(), "port": hub.getsockname()[1], "token": token}
    store.set(KEY, json.dumps(about))
    return hub, token


def call_hub(store: dist.Store, *, master: str, rank: int, heartbeat_s: float) -> tuple[Line, str]:
    """Another rank's connection to rank 0, which is at the address `master`, and rank 0's host.

    Waits for the announcement as long as the store waits.
    """
    hub = json.loads(store.get(KEY))
    line = Line(socket.create_connection((master, hub["port"]), timeout=heartbeat_s), heartbeat_s)
    line.send({"rank": rank, "host": socket.gethostname(), "token": hub["token"]})
    return line, hub["host"]


def _messages(lines: list[bytes]) -> list[dict[str, Any]]:
    found = []
    for line in lines:
        with contextlib.suppress(ValueError):
            message = json.loads(line)
            if isinstance(message, dict):
                found.append(message)
    return found
