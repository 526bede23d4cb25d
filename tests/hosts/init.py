"""Process 1 of a host: its mounts, its name, its sshd. Run in new namespaces with a JSON setting.

What is shared keeps its path. The folders that may hold it (/tmp, /run, the user's home) are
mounted over, so it is held open before and bound again afterwards, by its descriptor.
"""

from __future__ import annotations

import json
import os
import pwd
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

HOME = pwd.getpwuid(0).pw_dir
HIDDEN = ("/tmp/", f"{HOME}/", "/run/")
SSHD = """Port 22
HostKey /run/host_key
UsePAM no
PasswordAuthentication no
PermitRootLogin prohibit-password
PidFile none
MaxStartups 100
MaxSessions 100
UseDNS no
"""


def main(setting: dict) -> None:
    folder = Path(setting["folder"])
    socket.sethostname(setting["name"])
    mount_own(folder, setting["shared"], setting["private_mib"])
    allow_ssh(folder)
    say("mounted")
    sys.stdin.readline()  # until the cable is plugged in
    null = os.open(os.devnull, os.O_RDWR)
    with open("/run/sshd.log", "wb") as log:
        subprocess.Popen(
            ["/usr/sbin/sshd", "-D", "-e", "-f", "/run/sshd_config"],
            stdin=null,
            stdout=log,
            stderr=log,
            env={"PATH": "/usr/local/bin:/usr/bin:/bin"},
            start_new_session=True,
        )
    os.dup2(null, 0)
    os.dup2(null, 1)
    while True:  # orphans are process 1's to wait for
        try:
            os.wait()
        except ChildProcessError:
            time.sleep(1)


def mount_own(folder: Path, shared: list[str], private_mib: int) -> None:
    """Gives the host /proc, /tmp, /dev/shm, /run and home of its own."""
    interpreters = {os.path.realpath(prefix) for prefix in (sys.prefix, sys.base_prefix)}
    kept = {
        path: os.open(path, os.O_PATH | os.O_DIRECTORY)
        for path in sorted({*shared, str(folder), *interpreters})
        if path.startswith(HIDDEN) and os.path.isdir(path)
    }
    mount("-t", "proc", "proc", "/proc")
    mount("-t", "tmpfs", "-o", f"size={private_mib}m,mode=1777", "tmpfs", "/tmp")
    mount("-t", "tmpfs", "-o", "size=1g,mode=1777", "shm", "/dev/shm")
    mount("-t", "tmpfs", "-o", "mode=755", "run", "/run")
    mount("-t", "tmpfs", "-o", "mode=700", "home", HOME)
    for path, descriptor in kept.items():
        if os.path.isdir(path) and os.listdir(path):
            continue  # it lies in one that is bound already
        os.makedirs(path, exist_ok=True)
        # mount(8) would resolve the link, and find what lies at the path now.
        subprocess.run(
            ["mount", "--no-canonicalize", "--bind", f"/proc/self/fd/{descriptor}", path],
            check=True,
            pass_fds=[descriptor],
        )
    mount("--bind", str(folder / "etc_hosts"), "/etc/hosts")


def allow_ssh(folder: Path) -> None:
    """Lets the hosts reach each other by name, without a password."""
    keys, ssh = folder / "keys", Path(HOME, ".ssh")
    ssh.mkdir(mode=0o700)
    for source, target in (("user", ssh / "id_ed25519"), ("host", Path("/run/host_key"))):
        shutil.copy(keys / source, target)
        target.chmod(0o600)
    shutil.copy(keys / "user.pub", ssh / "authorized_keys")
    public = " ".join((keys / "host.pub").read_text().split()[:2])
    (ssh / "known_hosts").write_text(f"* {public}\n")
    os.makedirs("/run/sshd", mode=0o755, exist_ok=True)
    Path("/run/sshd_config").write_text(SSHD)


def mount(*words: str) -> None:
    subprocess.run(["mount", *words], check=True)


def say(word: str) -> None:
    sys.stdout.write(f"{word}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
