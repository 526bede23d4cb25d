"""A disk that forgets: records what a store does to it, and says what a power cut may leave.

A file's bytes are safe once the file was synced; before, any of: none, a part, all, zeros of the
right length. A name is safe once its directory was synced; before, each change of a name may be
there or not, whatever came first.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megadistill.storage.files import Files

Operation = tuple[str, Any, Any]


class Unsynced(Files):
    """The same operations, without waiting for a real disk."""

    def fsync(self, path: Path) -> None:
        pass

    def fsync_dir(self, path: Path) -> None:
        pass


class Recorder(Unsynced):
    """Does everything, and writes down what it did. `report` notes what a caller was told."""

    def __init__(self) -> None:
        self.operations: list[Operation] = []

    def note(self, name: str, path: Any, argument: object = None) -> None:
        self.operations.append((name, path, argument))

    def report(self, block: int) -> None:
        self.note("reported", block)

    def write_new(self, path: Path, data: bytes) -> None:
        super().write_new(path, data)
        self.note("write", path, data)

    def fsync(self, path: Path) -> None:
        # The shard was written by streaming, past this seam: its bytes are known from here on.
        self.note("fsync", path, path.read_bytes())

    def fsync_dir(self, path: Path) -> None:
        self.note("fsync_dir", path)

    def replace(self, source: Path, target: Path) -> None:
        super().replace(source, target)
        self.note("replace", target, source)

    def link(self, source: Path, target: Path) -> None:
        super().link(source, target)
        self.note("write", target, target.read_bytes())  # it may have been a copy

    def unlink(self, path: Path) -> None:
        super().unlink(path)
        self.note("unlink", path)

    def mkdir(self, path: Path) -> None:
        super().mkdir(path)
        self.note("mkdir", path)


class NoShardSync(Recorder):
    """Broken on purpose: a shard's bytes are never synced."""

    def fsync(self, path: Path) -> None:
        if path.name.startswith("shard"):
            self.note("write", path, path.read_bytes())
        else:
            super().fsync(path)


class NoMarkerSync(Recorder):
    """Broken on purpose: a marker's bytes are never synced."""

    def fsync(self, path: Path) -> None:
        if path.name != "marker":
            super().fsync(path)


class NoDirectorySync(Recorder):
    """Broken on purpose: names are never synced."""

    def fsync_dir(self, path: Path) -> None:
        pass


class MarkerFirst(Recorder):
    """Broken on purpose: a shard reaches its place only after its marker."""

    late: tuple[Path, Path] | None = None

    def replace(self, source: Path, target: Path) -> None:
        if target.suffix == ".mds":
            self.late = source, target
            return
        super().replace(source, target)
        if self.late:
            late, self.late = self.late, None
            super().replace(*late)
            self.fsync_dir(late[1].parent)


class RenameFirst(Recorder):
    """Broken on purpose: files are synced after they were put in place."""

    def fsync(self, path: Path) -> None:
        self.note("write", path, path.read_bytes())

    def replace(self, source: Path, target: Path) -> None:
        super().replace(source, target)
        super().fsync(target)


class InPlace(Recorder):
    """Broken on purpose: files are written under their own name at once."""

    def write_new(self, path: Path, data: bytes) -> None:
        Unsynced.write_new(self, path, data)

    def fsync(self, path: Path) -> None:
        pass

    def replace(self, source: Path, target: Path) -> None:
        Unsynced.replace(self, source, target)
        self.note("write", target, target.read_bytes())
        super().fsync(target)


class ReportedEarly(Recorder):
    """Broken on purpose: a block is reported when its marker is in place, and not yet durable."""

    def replace(self, source: Path, target: Path) -> None:
        super().replace(source, target)
        if target.parent.name == "blocks":
            self.report(int(target.stem))


BROKEN = [
    NoShardSync,
    NoMarkerSync,
    NoDirectorySync,
    MarkerFirst,
    RenameFirst,
    InPlace,
    ReportedEarly,
]


@dataclass(eq=False)
class File:
    """A file's bytes, and whether a power cut keeps them."""

    data: bytes
    synced: bool = False


@dataclass
class Disk:
    """Names as programs see them, and names as the disk knows them."""

    seen: dict[Path, File] = field(default_factory=dict)
    known: dict[Path, File] = field(default_factory=dict)
    folders: set[Path] = field(default_factory=set)
    reported: set[int] = field(default_factory=set)
    last: Path | None = None  # written last

    @classmethod
    def holding(cls, root: Path) -> Disk:
        """What lies below a folder by now, all of it durable."""
        disk = cls(folders={p for p in root.rglob("*") if p.is_dir()})
        files = {p: File(p.read_bytes(), synced=True) for p in root.rglob("*") if p.is_file()}
        disk.seen, disk.known = dict(files), dict(files)
        return disk

    def apply(self, operation: Operation) -> None:
        name, path, argument = operation
        if name == "write":
            written = self.seen[path] = File(argument)
            if path in self.known:  # rewritten in place
                self.known[path] = written
            self.last = path
        elif name == "fsync":
            self.seen.setdefault(path, File(argument)).synced = True
        elif name == "replace":
            self.seen[path] = self.seen.pop(argument)
            self.last = path if self.last == argument else self.last
        elif name == "unlink":
            self.seen.pop(path, None)
        elif name == "mkdir":
            self.folders.add(path)
        elif name == "fsync_dir":
            for p in [p for p in self.known.keys() | self.seen.keys() if p.parent == path]:
                if p in self.seen:
                    self.known[p] = self.seen[p]
                else:
                    self.known.pop(p)
        elif name == "reported":
            self.reported.add(path)
        elif name == "taken back":
            self.reported.discard(path)

    def crashes(self, store: Path) -> Iterator[dict[Path, bytes]]:
        """Every file that may be left after a power cut now: path to bytes."""
        for files in self._names(store):
            for lost in (_none, _half, _zeros, _all):
                yield {p: f.data if f.synced else lost(f.data) for p, f in files.items()}
        if self.last in self.seen and not self.seen[self.last].synced:
            data = self.seen[self.last].data
            step = 1 if len(data) <= 400 else len(data) // 32  # every byte of a marker
            for cut in range(0, len(data) + 1, step):
                for files in (self.known, self.seen):
                    yield {
                        p: f.data if f.synced else data[:cut] if p == self.last else b""
                        for p, f in files.items()
                    }

    def _names(self, store: Path) -> Iterator[dict[Path, File]]:
        changed = [
            p
            for p in sorted(self.known.keys() | self.seen.keys())
            if p.is_relative_to(store) and self.known.get(p) is not self.seen.get(p)
        ]
        assert len(changed) < 12, "so many that not all subsets can be tried"
        for count in range(len(changed) + 1):
            for there in itertools.combinations(changed, count):
                files = {p: f for p, f in self.seen.items() if not p.is_relative_to(store)}
                for p in self.known.keys() | self.seen.keys():
                    if p.is_relative_to(store):
                        file = (self.seen if p in there else self.known).get(p)
                        if file is not None:
                            files[p] = file
                yield files


def _none(data: bytes) -> bytes:
    return b""


def _half(data: bytes) -> bytes:
    return data[: len(data) // 2]


def _zeros(data: bytes) -> bytes:
    return bytes(len(data))


def _all(data: bytes) -> bytes:
    return data
