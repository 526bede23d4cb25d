"""A disk that fails: an error at every operation, and real disks that are full or read-only.

Each time: one of our errors that names the file and the reason, no block half visible, and a rerun
with a healthy disk that ends in the bytes of an undisturbed run.
"""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megadistill.blocks import open_store
from megadistill.blocks.install import retract_block
from megadistill.blocks.layout import kind_of
from megadistill.blocks.maintenance.merge import merge_stores
from megadistill.errors import StoreError
from megadistill.storage import files, lock
from tests.blocks.disk import Unsynced
from tests.blocks.stores import commit, create, fill, make_samples, same_sample, tree

SAMPLES = make_samples(10)
IDS = b"the ranking of ids"
ERRORS = [errno.ENOSPC, errno.EIO, errno.EROFS, errno.EACCES]
CHANGES = {
    "open": "write",
    "write": "write",
    "fsync": "write to disk",
    "replace": "put in place",
    "link": "copy",
    "unlink": "remove",
    "mkdir": "make the directory",
}


class FailingSystem:
    """The module `os`, with an error at change number `at` of what a store asks it to change."""

    def __init__(self, at: int, error: int) -> None:
        self.left, self.error = at, error
        self.failed: str | None = None

    def __getattr__(self, name: str) -> Any:
        real = getattr(os, name)
        return self._counted(name, real) if name in CHANGES else real

    def _counted(self, name: str, real: Callable) -> Callable:
        def change(*args: Any, **kwargs: Any) -> Any:
            writes = name != "open" or args[1] & os.O_CREAT
            self.left -= bool(writes)
            if writes and self.left == -1:
                self.failed = name
                raise OSError(self.error, os.strerror(self.error))
            return real(*args, **kwargs)

        return change


class ShortWrites(FailingSystem):
    """A disk that takes half of what is left at each write, and at write number `at` nothing."""

    def _counted(self, name: str, real: Callable) -> Callable:
        def write(handle: int, data: memoryview) -> int:
            self.left -= 1
            if self.left == -1:
                self.failed = name
                raise OSError(self.error, os.strerror(self.error))
            return real(handle, data[: max(1, len(data) // 2)])

        return write if name == "write" else real


def live(root: Path) -> None:
    """Create, fill, raise, replace a damaged block, take one back, finish, merge."""
    store = create(root / "store", ids_bin=IDS)
    for total in (6, 10):
        store.plan(total)
        for block in store.missing():
            commit(store, block, SAMPLES[:total])
    store.finish()
    shard = store.layout.shard(0)
    if shard.read_bytes()[-1:] != b"?":
        shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    commit(store, 0, SAMPLES)
    retract_block(files.LOCAL, store.layout, 2)
    commit(store, 2, SAMPLES)
    store.finish()
    merge_stores(root / "merged", [open_store(root / "store")])


def check_whole(path: Path) -> None:
    """A reader sees whole blocks only; the one that `live` damages may be found damaged."""
    if not (path.is_dir() and kind_of(path)):
        return
    store = open_store(path)
    for block in store.present():
        try:
            samples = store.block(block)
        except StoreError:
            assert block == 0
            continue
        assert all(same_sample(s, SAMPLES[4 * block + i]) for i, s in enumerate(samples))


def rerun(root: Path, reference: dict[str, bytes]) -> None:
    store = create(root / "store", ids_bin=IDS, files=Unsynced())
    store.clean()
    store.plan(10)
    for block in range(3):
        commit(store, block, SAMPLES)
    store.finish()
    assert store.complete()
    assert tree(root / "store") == reference


def inject(root: Path, system: FailingSystem, monkeypatch: pytest.MonkeyPatch) -> str | None:
    """Live on a failing system; the message of what was raised, None where nothing failed."""
    root.mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(files, "os", system)
        patch.setattr(lock, "os", system)
        try:
            live(root)
        except StoreError as error:
            return str(error)
    assert system.failed is None
    return None


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return tree(fill(tmp_path_factory.mktemp("a") / "store", SAMPLES, ids_bin=IDS).path)


def fail_everywhere(root: Path, reference: dict, patch: pytest.MonkeyPatch, turn: int) -> None:
    """Fail at change 0, 1, 2, ... of a life with each of the errors in turn."""
    # Nothing waits for the real disk here: the calls are what is counted.
    patch.setattr(os, "fsync", lambda handle: None)
    at, failed, recovered = 0, set(), set()
    while True:
        code = ERRORS[(at + turn) % len(ERRORS)]
        system = FailingSystem(at, code)
        message = inject(root / str(at), system, patch)
        if message is None:
            break
        assert system.failed
        action = "take the lock" if ".run/lock" in message else CHANGES[system.failed]
        assert f"cannot {action}: {os.strerror(code)}" in message, message
        assert message.startswith(str(root / str(at))), message
        assert "\n" not in message
        check_whole(root / str(at) / "store")
        check_whole(root / str(at) / "merged")
        state = hash(frozenset(tree(root / str(at) / "store").items()))
        if state not in recovered:
            rerun(root / str(at), reference)
        recovered.add(state)
        shutil.rmtree(root / str(at))
        failed.add(system.failed)
        at += 1
    assert at > 200
    assert failed == set(CHANGES)


def test_an_error_at_any_change_names_the_file_and_a_rerun_finishes(
    tmp_path: Path, reference: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_everywhere(tmp_path, reference, monkeypatch, 0)


@pytest.mark.long
@pytest.mark.parametrize("turn", [1, 2, 3])
def test_every_error_at_every_change(
    tmp_path: Path, reference: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, turn: int
) -> None:
    fail_everywhere(tmp_path, reference, monkeypatch, turn)


def test_short_writes_are_continued_and_one_that_stops_is_an_error(
    tmp_path: Path, reference: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", lambda handle: None)
    never = ShortWrites(1 << 60, errno.ENOSPC)
    assert inject(tmp_path / "whole", never, monkeypatch) is None
    assert tree(tmp_path / "whole/store") == tree(tmp_path / "whole/merged") == reference
    writes = (1 << 60) - never.left
    assert writes > 50
    for at in range(0, writes, 5):
        root = tmp_path / str(at)
        message = inject(root, ShortWrites(at, errno.ENOSPC), monkeypatch)
        assert message is not None
        assert "cannot write: No space left on device: free some space and run again" in message
        check_whole(root / "store")
        rerun(root, reference)


# Real ones, in processes of their own ----------------------------------------------------------

LIMITED = """
import resource, sys
from pathlib import Path
from megadistill.blocks.mds import mds_writer
from tests.blocks.test_failing_disk import SAMPLES, IDS, fill

mds_writer()
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), int(sys.argv[2])))
try:
    fill(Path(sys.argv[1]), SAMPLES, ids_bin=IDS)
except Exception as error:
    print(type(error).__name__, error)
"""

# Enters a tiny disk of its own, and runs what standard input says there.
TINY = 'mount -t tmpfs -o size=$0,nr_inodes=200 none $1 && exec $2 -c "$3" $1'

FULL = """
import os, sys
from pathlib import Path
from megadistill.errors import StoreError
from tests.blocks.test_failing_disk import *

root = Path(sys.argv[1])
reference = tree(fill(Path(sys.argv[1] + ".reference") / "store", SAMPLES, ids_bin=IDS).path)
ballast = root / "ballast"
room = os.statvfs(root).f_bavail * os.statvfs(root).f_bsize
messages = set()
for free in range(0, 40 * 4096, 4096):
    ballast.write_bytes(bytes(room - free))
    try:
        fill(root / "store", SAMPLES, ids_bin=IDS)
        break
    except StoreError as error:
        messages.add(str(error))
    check_whole(root / "store")
assert len(messages) > 3, messages
assert all("No space left on device: free some space" in m for m in messages), messages
ballast.unlink()
rerun(root, reference)
print("done")
"""

READ_ONLY = """
import subprocess, sys
from pathlib import Path
from megadistill.errors import StoreError
from tests.blocks.test_failing_disk import *

root = Path(sys.argv[1])
reference = tree(fill(Path(sys.argv[1] + ".reference") / "store", SAMPLES, ids_bin=IDS).path)
store = create(root / "store", ids_bin=IDS)
store.plan(10)
commit(store, 0, SAMPLES)
subprocess.run(["mount", "-o", "remount,ro", root], check=True)
for write in (lambda: commit(store, 1, SAMPLES), store.finish, lambda: store.lock().__enter__()):
    try:
        write()
        raise SystemExit("wrote to a read-only disk")
    except StoreError as error:
        assert "Read-only file system: make it writable and run again" in str(error), error
check_whole(root / "store")
assert store.missing() == [1, 2]
subprocess.run(["mount", "-o", "remount,rw", root], check=True)
rerun(root, reference)
print("done")
"""


def python(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Callable[[str, str], subprocess.CompletedProcess[str]]:
    """Runs a script with a disk of so many bytes of its own at its first argument."""
    alone = ["unshare", "--user", "--map-root-user", "--mount"]
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["sh", "-c", f"mount -t tmpfs none {place}"]
    if not shutil.which("unshare") or subprocess.run([*alone, *mount], check=False).returncode:
        pytest.skip("mounting a disk of one's own is not permitted here")

    def run(size: str, script: str) -> subprocess.CompletedProcess[str]:
        command = [*alone, "sh", "-c", TINY, size, str(place), sys.executable, script]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    return run


def test_streaming_that_runs_into_a_limit_is_an_error_of_ours(
    tmp_path: Path, reference: dict[str, bytes]
) -> None:
    done = python(LIMITED, tmp_path / "store", 400)  # headers fit, shards of 470 bytes do not
    assert done.stdout.startswith("StoreError"), done.stdout + done.stderr
    assert "shard.00000.mds: cannot write: File too large" in done.stdout
    assert sorted(tree(tmp_path)) == ["store/ids.bin", "store/plan.json", "store/tokens.json"]
    rerun(tmp_path, reference)


def test_a_full_disk_is_told_and_a_rerun_with_room_finishes(tiny_disk: Callable) -> None:
    done = tiny_disk("512k", FULL)
    assert done.stdout == "done\n", done.stdout + done.stderr


def test_a_disk_that_turns_read_only_is_told_and_a_rerun_finishes(tiny_disk: Callable) -> None:
    done = tiny_disk("512k", READ_ONLY)
    assert done.stdout == "done\n", done.stdout + done.stderr


def test_a_folder_that_turns_read_only_is_told(tmp_path: Path) -> None:
    store = create(tmp_path / "store")
    commit(store, 0, SAMPLES)
    try:
        store.path.chmod(0o500)
        if os.access(store.path, os.W_OK):
            pytest.skip("whoever runs this may write everywhere")
        with pytest.raises(StoreError, match=r"cannot put in place: Permission denied: make it"):
            commit(store, 1, SAMPLES)
    finally:
        store.path.chmod(0o700)
    assert store.present() == [0]
