"""One run at a time, and a dead run's lock taken over."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from megadistill.blocks import BlockWriter
from megadistill.errors import LockedError, StoreError
from megadistill.storage.files import Files
from megadistill.storage.lock import StoreLock, _identity
from tests.blocks.stores import commit, create, fill, make_samples, tree

SAMPLES = make_samples(10)


def lock(tmp_path: Path, *, patience_s: float = 0.2) -> StoreLock:
    return StoreLock(tmp_path / "lock", what="the store", patience_s=patience_s)


def test_a_second_run_is_refused_while_the_first_lives(tmp_path: Path) -> None:
    with lock(tmp_path) as held:
        assert held.held()
        with (
            pytest.raises(LockedError, match=f"the store: .* process {os.getpid()} on "),
            lock(tmp_path),
        ):
            pass
        assert held.held()
    with lock(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_lock_is_released_when_its_holder_fails(tmp_path: Path) -> None:
    with pytest.raises(KeyError), lock(tmp_path):
        raise KeyError
    with lock(tmp_path):
        pass


def test_a_process_number_used_again_is_not_the_old_holder(tmp_path: Path) -> None:
    holder = _identity() | {"nonce": "old", "started": "1"}
    (tmp_path / "lock").write_text(json.dumps(holder))
    with lock(tmp_path, patience_s=1000) as taken:
        assert taken.held()


def test_a_holder_that_was_replaced_knows_and_leaves_its_successor_alone(tmp_path: Path) -> None:
    first = lock(tmp_path)
    with first:
        holder = json.loads((tmp_path / "lock").read_text())
        (tmp_path / "lock").write_text(json.dumps(holder | {"nonce": "successor"}))
        assert not first.held()
    assert json.loads((tmp_path / "lock").read_text())["nonce"] == "successor"


PROGRAM = """
import os, sys
from pathlib import Path
from megadistill.storage.lock import StoreLock

with StoreLock(Path(sys.argv[1]), what="x", patience_s=1000):
    print("held", flush=True)
    sys.stdin.read()
"""


@contextlib.contextmanager
def another_run(path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that holds the lock until it is killed."""
    pipe = subprocess.PIPE
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(path)], stdin=pipe, stdout=pipe, text=True
    ) as run:
        assert run.stdout is not None
        assert run.stdout.readline() == "held\n"
        yield run
        run.kill()


def test_of_two_processes_the_second_is_refused_and_takes_over_when_the_first_is_killed(
    tmp_path: Path,
) -> None:
    store = create(tmp_path / "store")
    with another_run(store.lock().path) as first:
        since = r"20\d\d-\d\d-\d\d \d\d:\d\d:\d\d UTC"
        who = rf"process {first.pid} on {socket.gethostname()} since {since}"
        with pytest.raises(LockedError, match=rf"store: is being written by {who}: wait"):
            store.lock(patience_s=1000).__enter__()
        with pytest.raises(LockedError, match=rf"{who} has taken it over"):
            commit(store, 0, SAMPLES)
        assert store.present() == []
        first.send_signal(signal.SIGKILL)
        first.wait()
        with store.lock(patience_s=1000):  # at once: nobody waits for a process that is gone
            commit(store, 0, SAMPLES)


class Clock:
    """Time that passes only while somebody waits for it."""

    def __init__(self, meanwhile: Callable[[float], object] = lambda now: None) -> None:
        self.now, self.meanwhile = 0.0, meanwhile

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.meanwhile(self.now)


def far_lock(path: Path, clock: Clock) -> StoreLock:
    return StoreLock(path, what="the store", patience_s=60, clock=clock, sleep=clock.sleep)


def test_a_heartbeat_that_stands_still_for_a_minute_of_our_own_clock_is_that_of_a_dead_host(
    tmp_path: Path,
) -> None:
    path = tmp_path / "lock"
    path.write_text(json.dumps({"host": "far", "pid": 1, "nonce": "old"}))
    os.utime(path, (4e9, 4e9))  # its clock is years ahead: clocks are not compared
    clock = Clock()
    with far_lock(path, clock) as taken:
        assert taken.held()
    assert 60 <= clock.now < 62


def test_one_beat_within_the_minute_keeps_the_lock(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    path.write_text(json.dumps({"host": "far", "pid": 1, "nonce": "old"}))
    clock = Clock(lambda now: os.utime(path, (now, now)) if now > 59 else None)
    with pytest.raises(LockedError, match="process 1 on far"):
        far_lock(path, clock).__enter__()
    assert json.loads(path.read_text())["nonce"] == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "data",
    [b"", b"{", b"\xff\xfe", b"[1]", b"[" * 50_000, b"7", b'{"pid": "../../etc"}', b"x" * 70_000],
    ids=["empty", "cut", "no text", "list", "deep", "number", "odd", "long"],
)
def test_a_damaged_lock_file_is_waited_for_and_replaced(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "lock"
    path.write_bytes(data)
    clock = Clock()
    with far_lock(path, clock) as taken:
        assert taken.held()
    assert clock.now >= 60
    assert list(tmp_path.iterdir()) == []


def test_a_lock_that_cannot_be_written_is_an_error_of_ours(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"lock: cannot take the lock: No such file"):
        StoreLock(tmp_path / "nowhere/lock", what="x", patience_s=1).__enter__()
    (tmp_path / "lock").mkdir()
    with pytest.raises(StoreError, match=r"lock: cannot take the lock: Is a directory"):
        far_lock(tmp_path / "lock", Clock()).__enter__()


def test_a_run_that_lost_the_lock_commits_nothing_more_on_any_rank(tmp_path: Path) -> None:
    first = create(tmp_path / "store")
    with first.lock() as held:
        first.plan(10)
        other_rank = BlockWriter.open(tmp_path / "store")
        commit(first, 0, SAMPLES)
        commit(other_rank, 1, SAMPLES)
        before = tree(tmp_path / "store")
        lost = json.loads(held.path.read_text()) | {"nonce": "new", "host": "far", "pid": 7}
        held.path.write_text(json.dumps(lost))  # by a host that saw no heartbeat for a minute
        for store in (first, other_rank):
            for write in (
                lambda s: commit(s, 2, SAMPLES),
                lambda s: s.adopt(2, fill(tmp_path / "part", SAMPLES)),
                lambda s: s.plan(12),
                lambda s: s.finish(),
                lambda s: s.clean(),
            ):
                with pytest.raises(LockedError, match=r"process 7 on far .* has taken it over"):
                    write(store)
        successor = BlockWriter.open(tmp_path / "store")
        assert tree(tmp_path / "store") == before
        commit(successor, 2, SAMPLES)
    assert held.path.exists()  # the successor's
    held.path.unlink()
    with pytest.raises(LockedError, match="has ended"):
        commit(successor, 2, SAMPLES)


class Slow(Files):
    """Another run takes the lock while this one waits for the disk."""

    def __init__(self, path: Path, at: str) -> None:
        self.lock, self.at = path, at

    def fsync(self, path: Path) -> None:
        super().fsync(path)
        if path.name == self.at:
            self.lock.write_text(json.dumps({"host": "far", "pid": 7, "nonce": "new"}))


def test_a_lock_lost_between_shard_and_marker_leaves_no_marker_without_a_shard(
    tmp_path: Path,
) -> None:
    lock_path = create(tmp_path / "store").lock().path
    store = BlockWriter.open(tmp_path / "store", files=Slow(lock_path, "shard.00000.mds"))
    with store.lock(), pytest.raises(LockedError):
        commit(store, 0, SAMPLES)
    assert store.present() == []
