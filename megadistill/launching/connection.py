"""The command that runs a Python module on a host: over ssh, or directly on this one.

An ssh that gets no answer for 15 s ends with code 255, so that a host without power is noticed. The
program's standard input stays open as long as this process lives: the program ends with it.
"""

from __future__ import annotations

import os
import shlex
import socket
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil

import megadistill

# The folder that holds the package: a checkout's top level, or site-packages.
ROOT = Path(megadistill.__file__).resolve().parent.parent
CONNECT_S = 10
LOST = 255  # ssh's exit code when it could not connect or lost the connection
NO_FOLDER, NO_INTERPRETER = 97, 98  # exit codes of the remote shell
_SSH_OPTIONS = [
    *("-o", "BatchMode=yes"),
    *("-o", f"ConnectTimeout={CONNECT_S}"),
    *("-o", "ServerAliveInterval=5"),
    *("-o", "ServerAliveCountMax=3"),
]
# A remote shell starts with few variables. These go along where they are set here.
_PASSED = ("PATH", "LD_LIBRARY_PATH", "VIRTUAL_ENV", "XDG_CACHE_HOME", "TMPDIR", "no_proxy")
_PASSED_PREFIXES = (
    *("CUDA_", "DS_", "FI_", "GLOO_", "HF_", "MEGADISTILL_", "MKL_", "NCCL_", "OMP_", "TORCH_"),
    *("TORCHINDUCTOR_", "TRANSFORMERS_", "TRITON_", "UCX_", "http", "HTTP"),
)


def is_this_host(name: str) -> bool:
    """Whether a name or address is this machine's."""
    if name in ("localhost", socket.gethostname(), socket.getfqdn()):
        return True
    try:
        addresses = {str(info[4][0]) for info in socket.getaddrinfo(name, None)}
    except OSError:
        return False
    own = {each.address for many in psutil.net_if_addrs().values() for each in many}
    return bool(addresses & own)


def passed_environment() -> dict[str, str]:
    """The variables of this process that programs on other hosts get, too."""
    found = {
        key: value
        for key, value in os.environ.items()
        if key in _PASSED or key.startswith(_PASSED_PREFIXES)
    }
    python_path = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return found | {"PYTHONPATH": os.pathsep.join(python_path), "PYTHONUNBUFFERED": "1"}


def module_command(
    host: str, module: str, arguments: Sequence[str], *, ssh: Sequence[str], cwd: Path
) -> list[str]:
    """The command that runs `python -m MODULE ARGUMENTS` on a host, in the folder `cwd`.

    ssh: the program that connects, with the user's own options.
    """
    return [*ssh, *_SSH_OPTIONS, host, _script(module, arguments, passed_environment(), cwd)]


def local_command(module: str, arguments: Sequence[str]) -> list[str]:
    """The same on this host, without ssh; its environment is `passed_environment` on top."""
    return [sys.executable, "-m", module, *arguments]


def _script(module: str, arguments: Sequence[str], env: Mapping[str, str], cwd: Path) -> str:
    """A line for the remote user's shell, whichever it is."""
    inner = (
        f"cd {shlex.quote(str(cwd))} || exit {NO_FOLDER}; "
        f"[ -x {shlex.quote(sys.executable)} ] || exit {NO_INTERPRETER}; exec "
        + shlex.join(
            [
                "env",
                *(f"{key}={value}" for key, value in env.items()),
                *local_command(module, arguments),
            ]
        )
    )
    return shlex.join(["sh", "-c", inner])
