"""A host about itself, as a line of JSON: which machine, which code, how many accelerators.

python -m megadistill.launching.probe
"""

from __future__ import annotations

import json
import os
import socket
import sys
from pathlib import Path
from typing import Any

from xxhash import xxh3_128

from megadistill.launching.connection import ROOT


def code_hash(package: Path = ROOT / "megadistill") -> str:
    """A hash over the names and contents of the package's .py files."""
    total = xxh3_128()
    for path in sorted(package.rglob("*.py")):
        name, content = path.relative_to(package).as_posix().encode(), path.read_bytes()
        total.update(b"%d %d %b\n%b" % (len(name), len(content), name, content))
    return total.hexdigest()


def accelerators() -> int | None:
    """Number of accelerators that torch can use; None on a machine that has no such device."""
    devices = Path("/dev")
    if not any(devices.glob("nvidia[0-9]*")) and not (devices / "kfd").exists():
        return None
    import torch

    return torch.cuda.device_count()


def machine() -> list[str]:
    """Equal for two names of one machine, and for no others: containers have their own."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    namespace = Path("/proc/self/ns/pid")
    return [
        socket.gethostname(),
        boot.read_text().strip() if boot.exists() else "",
        os.readlink(namespace) if namespace.exists() else "",
    ]


def free_port() -> int:
    """A port that is free on this host now, for the ranks to meet at."""
    with socket.socket() as listener:
        listener.bind(("", 0))
        return int(listener.getsockname()[1])


def facts() -> dict[str, Any]:
    """All that is asked of a host."""
    return {
        "machine": machine(),
        "code": code_hash(),
        "accelerators": accelerators(),
        "port": free_port(),
    }


def main() -> int:
    """Print the facts."""
    sys.stdout.write(json.dumps(facts()) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
