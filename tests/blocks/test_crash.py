"""What a crash leaves: every prefix of the recorded file operations, on a disk that forgets.

The simulated disk keeps a file's bytes only once the file was synced (else half of them, or none)
and a name only once its directory was. Recovering means: what was reported durable is there and
right, nothing wrong is ever returned, and running again gives the bytes of an undisturbed run.
"""

from __future__ import annotations

import contextlib
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from megadistill.blocks import BlockStore
from megadistill.blocks.files import Files
from megadistill.blocks.layout import kind_of
from megadistill.errors import StoreError
from tests.blocks.stores import commit, create, fill, make_samples, same_sample, tree

SAMPLES = make_samples(10)
Operation = tuple[str, Path, object]


class Recorder(Files):
    """Does everything, and writes down what it did. `reported` marks what a caller was told."""

    def __init__(self) -> None:
        self.operations: list[Operation] = []

    def write_new(self, path: Path, data: bytes) -> None:
        super().write_new(path, data)
        self.operations.append(("write", path, data))

    def fsync(self, path: Path) -> None:
        super().fsync(path)
        # The shard was written by streaming, past this seam: its bytes are known from here on.
        self.operations.append(("fsync", path, path.read_bytes()))

    def fsync_dir(self, path: Path) -> None:
        super().fsync_dir(path)
        self.operations.append(("fsync_dir", path, None))

    def replace(self, source: Path, target: Path) -> None:
        super().replace(source, target)
        self.operations.append(("replace", target, source))

    def unlink(self, path: Path) -> None:
        super().unlink(path)
        self.operations.append(("unlink", path, None))

    def mkdir(self, path: Path) -> None:
        super().mkdir(path)
        self.operations.append(("mkdir", path, None))


class Unsynced(Files):
    """For recovering in tests: the same operations, without waiting for a real disk."""

    def fsync(self, path: Path) -> None:
        pass

    def fsync_dir(self, path: Path) -> None:
        pass


class NoFileSync(Recorder):
    """Broken on purpose: bytes are never synced."""

    def fsync(self, path: Path) -> None:
        self.operations.append(("write", path, path.read_bytes()))


class NoDirectorySync(Recorder):
    """Broken on purpose: names are never synced."""

    def fsync_dir(self, path: Path) -> None:
        pass


class MarkerFirst(Recorder):
    """Broken on purpose: a shard reaches its place only after its marker."""

    def __init__(self) -> None:
        super().__init__()
        self._late: tuple[Path, Path] | None = None

    def replace(self, source: Path, target: Path) -> None:
        if target.suffix == ".mds":
            self._late = source, target
            return
        super().replace(source, target)
        if self._late:
            late, self._late = self._late, None
            super().replace(*late)
            self.fsync_dir(late[1].parent)


@dataclass
class File:
    """A file's bytes, and those of them that a crash keeps."""

    data: bytes
    kept: bytes | None = None


@dataclass
class Disk:
    """Names as programs see them, and names as the disk knows them."""

    seen: dict[Path, File] = field(default_factory=dict)
    known: dict[Path, File] = field(default_factory=dict)
    folders: set[Path] = field(default_factory=set)
    reported: set[int] = field(default_factory=set)

    def apply(self, operation: Operation) -> None:
        name, path, argument = operation
        if name == "write":
            self.seen[path] = File(argument)
        elif name == "fsync":
            file = self.seen.setdefault(path, File(argument))
            file.kept = file.data
        elif name == "replace":
            self.seen[path] = self.seen.pop(argument)
        elif name == "unlink":
            self.seen.pop(path, None)
        elif name == "mkdir":
            self.folders.add(path)
        elif name == "fsync_dir":
            inside = [p for p in self.known.keys() | self.seen.keys() if p.parent == path]
            for p in inside:
                if p in self.seen:
                    self.known[p] = self.seen[p]
                else:
                    self.known.pop(p)
        elif name == "reported":
            self.reported.add(argument)

    def crash(self, root: Path, target: Path, *, names_kept: bool, torn: bool) -> None:
        """Write to `target` what is left of `root` after the power went."""
        for folder in sorted(f for f in self.folders if f.is_relative_to(root)):
            (target / folder.relative_to(root)).mkdir(parents=True, exist_ok=True)
        for path, file in (self.seen if names_kept else self.known).items():
            lost = file.data[: len(file.data) // 2] if torn else b""
            place = target / path.relative_to(root)
            place.parent.mkdir(parents=True, exist_ok=True)  # streaming makes a folder of its own
            place.write_bytes(file.data if file.kept is not None else lost)


def record(root: Path, files: Recorder) -> list[Operation]:
    """An ordinary life: created, filled, finished, and raised to more sequences."""
    store = create(root / "store", files=files)
    for total in (6, 10):
        store.plan(total)
        for block in store.missing():
            files.operations.append(("reported gone", root, block))
            commit(store, block, SAMPLES[:total])
            files.operations.append(("reported", root, block))
        store.finish()
    return files.operations


def check_every_prefix(root: Path, operations: list[Operation], work: Path) -> int:
    """AssertionError or one of our errors where a crash is not recovered from; else how many."""
    reference = tree(fill(work / "reference", SAMPLES, files=Unsynced()).path)
    disk, crashes = Disk(), 0
    states: set[int] = set()  # most operations are on temporary files, and change nothing here
    for operation in operations:
        if operation[0] == "reported gone":
            disk.reported.discard(operation[2])
            continue
        disk.apply(operation)
        for names_kept, torn in ((False, False), (False, True), (True, False), (True, True)):
            left = work / "left"
            left.mkdir()
            disk.crash(root, left, names_kept=names_kept, torn=torn)
            state = hash((frozenset(tree(left / "store").items()), frozenset(disk.reported)))
            if state not in states:
                check_recovery(left / "store", disk.reported, reference)
            states.add(state)
            shutil.rmtree(left)
            crashes += 1
    return crashes


def check_recovery(path: Path, reported: set[int], reference: dict[str, bytes]) -> None:
    if path.is_dir() and kind_of(path):
        store = BlockStore.open(path)
        present = set(store.present())
        # Raising the plan takes the short block 1 back before it is done again.
        assert reported - {1} <= present, "a block that was reported durable is gone"
        for block in present:
            count = len(store.block(block))
            first = block * store.block_size
            assert all(same_sample(store[first + i], SAMPLES[first + i]) for i in range(count))
        strays = ("a shard without a marker", "differs from what the markers say")
        assert [f for f in store.verify() if not any(s in f for s in strays)] == []
    else:
        assert not reported
    store = create(path, files=Unsynced())
    store.clean()
    store.plan(10)
    for block in store.missing():
        commit(store, block, SAMPLES)
    store.finish()
    assert store.complete()
    assert tree(path) == reference


def test_a_crash_after_any_operation_is_recovered_from(tmp_path: Path) -> None:
    operations = record(tmp_path / "run", Recorder())
    (tmp_path / "work").mkdir()
    crashes = check_every_prefix(tmp_path / "run", operations, tmp_path / "work")
    assert crashes > 200


@pytest.mark.parametrize("broken", [NoFileSync, NoDirectorySync, MarkerFirst])
def test_the_replay_notices_what_is_broken_on_purpose(
    tmp_path: Path, broken: type[Recorder]
) -> None:
    operations = record(tmp_path / "run", broken())
    (tmp_path / "work").mkdir()
    with pytest.raises(Exception, match=r"durable|damaged|assert"):
        check_every_prefix(tmp_path / "run", operations, tmp_path / "work")


class Failing(Unsynced):
    """Fails at operation number `at`, as a full disk or a dying one does."""

    def __init__(self, at: int) -> None:
        self.left = at

    def _count(self) -> None:
        self.left -= 1
        if self.left < 0:
            raise OSError(28, "No space left on device")

    def write_new(self, path: Path, data: bytes) -> None:
        self._count()
        super().write_new(path, data)

    def fsync(self, path: Path) -> None:
        self._count()
        super().fsync(path)

    def fsync_dir(self, path: Path) -> None:
        self._count()
        super().fsync_dir(path)

    def replace(self, source: Path, target: Path) -> None:
        self._count()
        super().replace(source, target)


def test_an_error_at_any_operation_leaves_a_store_that_a_rerun_finishes(tmp_path: Path) -> None:
    reference = tree(fill(tmp_path / "reference", SAMPLES).path)
    at, done = 0, False
    while not done:
        path = tmp_path / f"store{at}"
        with contextlib.suppress(OSError, StoreError):
            fill(path, SAMPLES, files=Failing(at))
            done = True
        check_recovery(path, set(), reference)
        at += 1
    assert at > 30
