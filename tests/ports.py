"""Ports to meet at."""

from __future__ import annotations

import random
import socket


def free_port() -> int:
    """A port that nobody listens on, of those that are not dealt out to whoever connects.

    A port that the system chose and that is given back may be another's before the ranks listen.
    """
    while True:
        port = random.SystemRandom().randrange(10_000, 30_000)
        with socket.socket() as s:
            try:
                s.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
