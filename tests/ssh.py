"""A real ssh server on this machine, for programs that DeepSpeed starts from a hostfile."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from pathlib import Path

from tests.ports import free_port


def available() -> bool:
    """Whether a server can be started here: Debian's openssh-server and pdsh, as root."""
    return os.geteuid() == 0 and bool(_sshd()) and bool(shutil.which("pdsh"))


def _sshd() -> str | None:
    return shutil.which("sshd", path=f"/usr/sbin:{os.environ.get('PATH', '')}")


class SshServer:
    """sshd on a free port of the loopback, with keys of its own, and an `ssh` that finds it.

    `path` goes first on PATH: its `ssh` is the real one with a configuration that sends every host
    name to this server. Nothing in anybody's ~/.ssh is touched.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        folder.chmod(0o700)
        self.port = port = free_port()
        for key in ("host_key", "user_key"):
            subprocess.run(
                ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / key)], check=True
            )
        shutil.copy(folder / "user_key.pub", folder / "authorized_keys")
        Path("/run/sshd").mkdir(exist_ok=True)
        (folder / "sshd_config").write_text(
            f"Port {port}\nListenAddress 127.0.0.1\nHostKey {folder}/host_key\n"
            "Subsystem sftp internal-sftp\n"
            f"AuthorizedKeysFile {folder}/authorized_keys\nPidFile none\nStrictModes no\n"
            "PermitRootLogin prohibit-password\nPasswordAuthentication no\nUsePAM no\n"
        )
        (folder / "ssh_config").write_text(
            f"Host *\n HostName 127.0.0.1\n Port {port}\n IdentityFile {folder}/user_key\n"
            " IdentitiesOnly yes\n StrictHostKeyChecking no\n UserKnownHostsFile /dev/null\n"
            " LogLevel ERROR\n"
        )
        self.path = folder / "bin"
        self.path.mkdir()
        wrapper = self.path / "ssh"
        wrapper.write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {folder}/ssh_config "$@"\n')
        wrapper.chmod(0o755)
        self.log = (folder / "log").open("wb")
        self.process = subprocess.Popen(
            [_sshd(), "-D", "-e", "-f", str(folder / "sshd_config")], stderr=self.log
        )
        for _ in range(100):
            with socket.socket() as s:
                if s.connect_ex(("127.0.0.1", port)) == 0:
                    return
            time.sleep(0.05)
        raise RuntimeError(f"sshd did not start: {(folder / 'log').read_text()}")

    def close(self) -> None:
        self.process.terminate()
        self.process.wait()
        self.log.close()
