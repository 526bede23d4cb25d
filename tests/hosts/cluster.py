"""A cluster of hosts made of namespaces: up, cut, silenced, slowed, powered off, booted, down.

    with Cluster(2, folder=tmp_path, shared=[tmp_path, ROOT]) as cluster:  # host-1, host-2
        job = cluster.start("host-1", ["deepspeed", "--hostfile", ...], cwd=ROOT)
        cluster.cut("host-2")
        job.wait(60)

The hosts' cables end in a bridge in a network namespace of its own, so that nothing of the
machine's network is touched. All hosts end with this process, however it ends.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.hosts.init import HOME
from tests.programs import ROOT

NETWORK = "10.77.0"
PLAIN = {
    "HOME": HOME,
    "USER": "root",
    "LANG": "C.UTF-8",
    "TERM": "dumb",
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
}
_CPU = Path("/sys/fs/cgroup/cpu")
_CPU_PERIOD_US = 100_000
_NAMESPACES = ["--net", "--pid", "--mount", "--uts", "--ipc"]
_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None, use_errno=True)


def unavailable() -> str | None:
    """Why a cluster cannot be made on this machine, or None."""
    if os.geteuid() != 0:
        return "hosts made of namespaces need root"
    for tool in ("ip", "unshare", "nsenter", "ssh", "ssh-keygen"):
        if shutil.which(tool) is None:
            return f"hosts made of namespaces need `{tool}`: run .ci/packages"
    if shutil.which("sshd", path="/usr/sbin:/usr/local/sbin") is None:
        return "hosts made of namespaces need sshd: run .ci/packages"
    bridge = ["ip", "link", "add", "name", "br0", "type", "bridge"]
    tried = subprocess.run(
        ["unshare", *_NAMESPACES, "--fork", *bridge], capture_output=True, text=True
    )
    return None if tried.returncode == 0 else f"no namespaces here: {tried.stderr.strip()}"


class Job:
    """A program on a host; `output` holds both of its streams."""

    def __init__(self, cluster: Cluster, host: str, process: subprocess.Popen, output: Path):
        self.cluster, self.host, self.process, self.output = cluster, host, process, output

    @property
    def text(self) -> str:
        return self.output.read_text(errors="replace")

    @property
    def pid(self) -> int:
        """The program's process number in its host's namespace."""
        pid_file = self.output.with_suffix(".pid")
        wait_until(lambda: pid_file.exists() and pid_file.read_text().strip(), 10, "a process")
        return int(pid_file.read_text())

    def signal(self, number: int) -> None:
        self.cluster.run(self.host, ["kill", f"-{int(number)}", str(self.pid)])

    def wait_for(self, words: str, seconds: float) -> None:
        """Returns once the output holds `words`. AssertionError where it ends without them."""

        def there() -> bool:
            ended = self.process.poll() is not None
            if words in self.text:
                return True
            assert not ended, f"ended ({self.process.returncode}) without {words!r}:\n{self.text}"
            return False

        wait_until(there, seconds, f"{words!r} in\n{self.output}")

    def wait(self, seconds: float) -> int:
        """Returns the exit code. AssertionError, with the output, where it takes longer."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {seconds} s:\n{self.text}") from None


class Cluster:
    """Hosts by name, from `with` to its end."""

    def __init__(
        self,
        hosts: int,
        *,
        folder: Path,
        shared: Sequence[Path] = (),
        private_mib: int = 512,
        names: Sequence[str] = (),
    ) -> None:
        """Names the hosts host-1, host-2, ... unless `names` does.

        shared: folders that all hosts see, beside the interpreter and what lies outside of /tmp,
        /run and the home folder. private_mib: the size of each host's own /tmp.
        """
        self.folder = folder.resolve()
        self.shared = [str(path.resolve()) for path in shared]
        self.private_mib = private_mib
        self.names = list(names) or [f"host-{number}" for number in range(1, hosts + 1)]
        self._holders: dict[str, subprocess.Popen] = {}
        self._inits: dict[str, int] = {}  # pid 1 of each host, as this process sees it
        self._switch: subprocess.Popen | None = None
        self._jobs = 0

    def __enter__(self) -> Cluster:
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            self._make_keys()
            self._start_switch()
            for name in self.names:
                self.boot(name)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for name in list(self._inits):
            self.power_off(name)
        if self._switch is not None:
            self._switch.kill()
            self._switch.wait()
            assert self._switch.stdout
            self._switch.stdout.close()

    def hostfile(self, *names: str, slots: int = 1) -> Path:
        """A hostfile of these hosts, or of all."""
        path = self.folder / "hostfile"
        path.write_text("".join(f"{name} slots={slots}\n" for name in names or self.names))
        return path

    # Programs -----------------------------------------------------------------------------------

    def run(
        self,
        name: str,
        command: Sequence[object],
        *,
        cwd: Path = ROOT,
        env: Mapping[str, str] | None = None,
        timeout: float | None = 60,
    ) -> subprocess.CompletedProcess[str]:
        """Runs a program on a host and returns what it printed."""
        return subprocess.run(
            self._command(name, ["sh", "-c", 'cd "$0" && exec "$@"', cwd, *command], env),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
            preexec_fn=lambda: self._join_cpu_group(name),
        )

    def start(
        self,
        name: str,
        command: Sequence[object],
        *,
        cwd: Path = ROOT,
        env: Mapping[str, str] | None = None,
    ) -> Job:
        """Starts a program on a host."""
        self._jobs += 1
        output = self.folder / f"job-{self._jobs}.log"
        script = 'echo $$ > "$0"; cd "$1" || exit 97; shift; exec "$@"'
        words = ["sh", "-c", script, output.with_suffix(".pid"), cwd, *command]
        with output.open("wb") as file:
            process = subprocess.Popen(
                self._command(name, words, env),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                preexec_fn=lambda: self._join_cpu_group(name),
            )
        return Job(self, name, process, output)

    def processes(self, name: str, words: str = "") -> dict[int, str]:
        """Command lines by process number, of those that hold `words`; sshd's own left out."""
        listed = self.run(name, ["ps", "-eo", "pid=,args=", "-ww"]).stdout.splitlines()
        lines = dict(line.strip().partition(" ")[::2] for line in listed)
        own = ("ps -eo", "sshd: /", "/usr/sbin/sshd -D")
        return {
            int(pid): line.strip()
            for pid, line in lines.items()
            if pid != "1" and words in line and not line.strip().startswith(own)
        }

    def kill(self, name: str, words: str, number: int = signal.SIGKILL) -> list[int]:
        """Signals the processes whose command line holds `words`, on this host alone."""
        pids = sorted(self.processes(name, words))
        if pids:
            self.run(name, ["kill", f"-{int(number)}", *pids])
        return pids

    # Failures -----------------------------------------------------------------------------------

    def cut(self, name: str) -> None:
        """Pulls a host's cable: both ends lose their carrier."""
        self._set_port(name, "down")

    def silence(self, name: str) -> None:
        """Drops a host's packets and keeps its carrier, as when a switch further on is gone."""
        self._set_port(name, "nomaster")

    def restore(self, name: str) -> None:
        self._set_port(name, "master", "br0", "up")

    def slow(self, name: str, share: float | None) -> None:
        """Gives a host this share of one processor at most; None lifts the limit."""
        quota = -1 if share is None else int(_CPU_PERIOD_US * share)
        (self._cpu_group(name) / "cpu.cfs_quota_us").write_text(str(quota))

    @property
    def can_slow(self) -> bool:
        return os.access(_CPU, os.W_OK)

    def power_off(self, name: str) -> None:
        """Ends all of a host at once. Nothing leaves it, not even the end of a connection."""
        with contextlib.suppress(subprocess.CalledProcessError):
            self.silence(name)
        holder = self._holders.pop(name)
        del self._inits[name]
        holder.kill()
        holder.wait()
        assert holder.stdin
        assert holder.stdout
        holder.stdin.close()
        holder.stdout.close()
        with contextlib.suppress(OSError):
            self._cpu_group(name).rmdir()

    def boot(self, name: str) -> None:
        """Starts a host, also one that was powered off; returns when its sshd answers."""
        setting = {
            "name": name,
            "folder": str(self.folder),
            "shared": self.shared,
            "private_mib": self.private_mib,
        }
        if self.can_slow:
            self._cpu_group(name).mkdir(exist_ok=True)
        unshare = ["unshare", *_NAMESPACES, "--fork", "--kill-child=SIGKILL"]
        init = [sys.executable, str(Path(__file__).with_name("init.py")), json.dumps(setting)]
        holder = subprocess.Popen(
            [*unshare, "--propagation", "private", *init],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            preexec_fn=lambda: (_die_with_parent(), self._join_cpu_group(name)),
        )
        assert holder.stdin
        assert holder.stdout
        self._holders[name] = holder
        said = holder.stdout.readline()
        assert said == b"mounted\n", f"{name} did not come up: {said!r}"
        children = Path(f"/proc/{holder.pid}/task/{holder.pid}/children").read_text().split()
        self._inits[name] = int(children[0])
        self._plug_in(name)
        holder.stdin.write(b"go\n")
        holder.stdin.flush()
        listening = ["sh", "-c", "ss -ltn | grep -q ':22 '"]
        wait_until(lambda: self.run(name, listening).returncode == 0, 15, f"sshd on {name}")

    # Inside -------------------------------------------------------------------------------------

    def _make_keys(self) -> None:
        keys = self.folder / "keys"
        keys.mkdir(exist_ok=True, mode=0o700)
        for key in ("host", "user"):
            if not (keys / key).exists():
                make = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(keys / key)]
                subprocess.run(make, check=True)
        lines = [f"{self.address(name)} {name}\n" for name in self.names]
        (self.folder / "etc_hosts").write_text("127.0.0.1 localhost\n" + "".join(lines))

    def address(self, name: str) -> str:
        return f"{NETWORK}.{self.names.index(name) + 1}"

    def _start_switch(self) -> None:
        if self.can_slow:
            for left in _CPU.glob("hosts-*"):  # by processes that were killed; a used one stays
                with contextlib.suppress(OSError):
                    left.rmdir()
        script = "ip link add br0 type bridge && ip link set br0 up && echo up && sleep infinity"
        self._switch = subprocess.Popen(
            ["unshare", "--net", "sh", "-c", script],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            preexec_fn=_die_with_parent,
        )
        assert self._switch.stdout
        assert self._switch.stdout.readline() == b"up\n"

    def _plug_in(self, name: str) -> None:
        number, init = self.names.index(name), self._inits[name]
        port = self._port(name)
        assert self._switch
        switch = self._switch.pid
        with contextlib.suppress(subprocess.CalledProcessError):  # left by a host powered off
            _ip(switch, "link", "del", port)
        _ip(switch, "link", "add", port, "type", "veth", "peer", "eth0", "netns", str(init))
        self._set_port(name, "master", "br0", "up")
        _ip(init, "link", "set", "lo", "up")
        # The same address at each boot: the neighbours remember it.
        _ip(init, "link", "set", "eth0", "address", f"02:77:00:00:00:{number + 1:02x}")
        _ip(init, "addr", "add", f"{self.address(name)}/24", "dev", "eth0")
        _ip(init, "link", "set", "eth0", "up")

    def _port(self, name: str) -> str:
        return f"port{self.names.index(name)}"

    def _set_port(self, name: str, *state: str) -> None:
        assert self._switch
        _ip(self._switch.pid, "link", "set", self._port(name), *state)

    def _command(
        self, name: str, command: Sequence[object], env: Mapping[str, str] | None
    ) -> list[str]:
        enter = ["nsenter", "-t", self._inits[name], "-m", "-u", "-i", "-n", "-p", "--"]
        settings = [f"{key}={value}" for key, value in {**PLAIN, **(env or {})}.items()]
        return [str(word) for word in (*enter, "env", "-i", *settings, *command)]

    def _cpu_group(self, name: str) -> Path:
        return _CPU / f"hosts-{zlib.crc32(str(self.folder).encode())}-{name}"

    def _join_cpu_group(self, name: str) -> None:
        with contextlib.suppress(OSError):
            (self._cpu_group(name) / "cgroup.procs").write_text(str(os.getpid()))


def wait_until(there: Callable[[], Any], seconds: float, name: str) -> None:
    """Returns once there() is true. AssertionError where that takes longer."""
    end = time.monotonic() + seconds
    while not there():
        assert time.monotonic() < end, f"waited {seconds} s for {name}"
        time.sleep(0.05)


def _ip(pid: int, *words: str) -> None:
    """`ip` in the network namespace of a process."""
    subprocess.run(["nsenter", "-t", str(pid), "-n", "ip", *words], check=True, capture_output=True)


def _die_with_parent() -> None:
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def made(count: int, folder: Path, *shared: Path) -> Iterator[Cluster]:
    """For a fixture: yields a cluster that shares `folder` and the checkout, or skips loudly."""
    import pytest

    if reason := unavailable():
        pytest.skip(reason)
    with Cluster(count, folder=folder, shared=[folder, ROOT, *shared]) as cluster:
        yield cluster
