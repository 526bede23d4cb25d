"""On each host: starts DeepSpeed's launcher of its ranks, and ends them with the connection.

    python -m megadistill.launching.agent [options of deepspeed.launcher.launch] ...

Lines of standard input are signals for the ranks ("SIGINT", "SIGTERM", "SIGHUP"). Its end is the
end of whoever started all of this, and so of the ranks: SIGTERM, and SIGKILL for what is left.
Signals go to the ranks and not to DeepSpeed's launcher, which would end them one after the other.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import threading

import psutil

GRACE_S = 60.0  # a rank that saves is given `parallel.save_within_s` and more
SIGNALS = {name: getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP")}
_PR_SET_PDEATHSIG = 1


def main(argv: list[str]) -> int:
    """Returns the launcher's exit code, as a shell gives it."""
    for number in SIGNALS.values():  # they come as lines
        signal.signal(number, signal.SIG_IGN)
    libc = ctypes.CDLL(None)

    def prepare() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        for number in SIGNALS.values():
            signal.signal(number, signal.SIG_DFL)

    launcher = subprocess.Popen(
        [sys.executable, "-u", "-m", "deepspeed.launcher.launch", *argv],
        stdin=subprocess.DEVNULL,
        preexec_fn=prepare,
    )
    threading.Thread(target=_listen, args=(launcher,), daemon=True).start()
    code = launcher.wait()
    _signal(os.getpid(), signal.SIGKILL)
    return code if code >= 0 else 128 - code


def _listen(launcher: subprocess.Popen) -> None:
    for line in sys.stdin:
        if (number := SIGNALS.get(line.strip())) is not None:
            _signal(launcher.pid, number)
    _signal(launcher.pid, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        launcher.wait(GRACE_S)
    _signal(os.getpid(), signal.SIGKILL)


def _signal(parent: int, number: int) -> None:
    """Signals the children of a process; SIGKILL goes to their children as well."""
    with contextlib.suppress(psutil.NoSuchProcess):
        for process in psutil.Process(parent).children(recursive=number == signal.SIGKILL):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(number)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
