"""Hostile stores: names that lead elsewhere, links and pipes, absurd values, bombs.

All are refused, and an audit hook sees that nothing outside the store was opened.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
from functools import partial
from pathlib import Path

import pytest
import xxhash

import megadistill
from megadistill.blocks import BlockReader, open_store
from megadistill.blocks.maintenance.verify import verify_store
from megadistill.errors import CorruptBlockError, StoreError
from megadistill.storage.records import decode_json
from tests.blocks.stores import fill, forge, make_samples, read_all

SAMPLES = make_samples(10)


@pytest.fixture
def store(tmp_path: Path) -> BlockReader:
    return fill(tmp_path / "store", SAMPLES, ids_bin=b"the ranking of ids")


NAMES = [
    "../secret",
    "../../secret",
    "/etc/passwd",
    "//etc/passwd",
    "..",
    ".",
    "./",
    "",
    "/",
    "~/secret",
    "./shard.000000.mds",
    "../store/shard.000000.mds",
    "shard.000000.mds/../../secret",
    "blocks/../../secret",
    "blocks/000000.json",
    "tokens.json",
    "shard.000001.mds",
    "shard.000000.mds\0",
    "shard.000000.mds\0../secret",
    "shard.000000.mds ",
    " shard.000000.mds",
    "shard.000000.mds\n",
    "SHARD.000000.MDS",
    "Shard.000000.mds",
    "shard.0.mds",
    "shard.00000000000.mds",
    "shard.-00001.mds",
    "shard.000000.mds.zstd",
    "file:///etc/passwd",
    "http://localhost/secret",
    "\\\\host\\share",
    "..\\secret",
    "C:secret",
    "%2e%2e/secret",
    "\u2024\u2024/secret",
    "shard\u2024000000\u2024mds",
    "\u202eshard.000000.mds",
    "shard.\uff10\uff10\uff10\uff10\uff10\uff10.mds",
    "shard.00000\u0660.mds",
    "\ud800",
    "a" * 5000,
    "a/" * 3000,
    "/dev/zero",
    "/dev/stdin",
    "/proc/self/environ",
    "pipe",
    "link",
    "device",
    7,
    None,
    True,
    ["shard.000000.mds"],
    {"file": "shard.000000.mds"},
]


class Opened:
    """Every path that this process opens or lists while it is watched."""

    def __init__(self) -> None:
        self.paths: list[str] | None = None

    def __call__(self, event: str, args: tuple) -> None:
        watched = self.paths is not None and event in ("open", "os.listdir", "os.scandir")
        if watched and not isinstance(args[0], int):  # a file that is open already
            path = os.fsdecode(args[0])
            stays = event == "open" and args[2] & os.O_NOFOLLOW
            self.paths.append(path if stays else os.path.realpath(path))


@pytest.fixture(scope="module")
def opened() -> Opened:
    hook = Opened()
    sys.addaudithook(hook)  # cannot be removed again; watches only when asked to
    return hook


@pytest.fixture
def hostile(store: BlockReader) -> BlockReader:
    """A store with things around and inside that must not be opened."""
    (store.path.parent / "secret").write_bytes(store.layout.shard(0).read_bytes())
    os.mkfifo(store.path / "pipe")
    (store.path / "link").symlink_to("../secret")
    (store.path / "device").symlink_to("/dev/zero")
    return store


def read_and_verify(path: Path) -> None:
    read_all(path, SAMPLES)
    raise StoreError("; ".join(verify_store(open_store(path))))


def refuse(store: BlockReader, opened: Opened, match: str) -> None:
    """Reading, or else verifying, refuses the store, and nothing outside it is opened."""
    opened.paths = []
    try:
        with pytest.raises(StoreError, match=match) as caught:
            read_and_verify(store.path)
        assert len(str(caught.value)) < 2500
    finally:
        paths, opened.paths = opened.paths, None
    code = (str(Path(megadistill.__file__).parent), sys.prefix, sys.base_prefix)
    inside = (str(store.path), f"{store.path}.run", *code)
    assert [p for p in paths or [] if not p.startswith(inside) or ".." in p] == []


@pytest.mark.parametrize("name", NAMES)
def test_a_marker_that_names_another_file_is_refused(
    hostile: BlockReader, opened: Opened, name: object
) -> None:
    (hostile.path / "blocks.bin").unlink()
    forge(hostile.layout.marker(0), lambda m: m["shard"].update(file=name))
    refuse(hostile, opened, r"000000\.json: expected shard: file shard\.000000\.mds")


def test_an_index_that_names_another_file_is_refused(hostile: BlockReader, opened: Opened) -> None:
    for name in NAMES:
        sound = hostile.layout.index.read_bytes()
        forge(hostile.layout.index, lambda i, n=name: i["shards"][0]["raw_data"].update(basename=n))
        refuse(hostile, opened, r"index\.json: differs")
        hostile.layout.index.write_bytes(sound)
    hostile.layout.marker(2).unlink()  # and where the store is not complete yet
    (hostile.path / "blocks.bin").unlink()
    for name in NAMES:
        forge(hostile.layout.index, lambda i, n=name: i["shards"][0]["raw_data"].update(basename=n))
        refuse(hostile, opened, r"index\.json: expected (entries|at most)")
        hostile.layout.index.write_bytes(sound)


def test_a_header_with_other_names_or_values_is_refused(
    hostile: BlockReader, opened: Opened
) -> None:
    header = hostile.layout.header("tokens")
    sound = header.read_bytes()
    columns = hostile.columns
    changes: list[dict] = [{"kind": name} for name in NAMES]
    changes += [{"columns": columns | {"tokens": name}} for name in NAMES]
    changes += [{"columns": {**columns, str(name): "bytes"}} for name in NAMES]
    changes += [{"ids_bin": {"size": 9, "xxh3": name}} for name in NAMES]
    changes += [{key: value} for key in ABSURD for value in ABSURD[key]]
    for change in changes:
        forge(header, lambda h, c=change: h.update(c))
        refuse(hostile, opened, r"tokens\.json|shard\.000000\.mds: expected|column ")
        header.write_bytes(sound)


@pytest.mark.parametrize("size", [1 << 40, 1 << 62, 10**30])
def test_a_ranking_that_is_announced_to_be_huge_costs_no_memory(
    hostile: BlockReader, size: int
) -> None:
    header = hostile.layout.header("tokens")
    forge(header, lambda h: h["ids_bin"].update(size=size))
    with pytest.raises(CorruptBlockError, match=rf"ids\.bin: expected {size} bytes, found 18"):
        open_store(hostile.path).ids_bin()


ABSURD: dict[str, list] = {
    "format_version": [0, 2, -1, 1.0, "1", True, None, 10**4000, "9" * 10**6],
    "features": [["zstd"], "zstd", None, {}, [[]], ["x" * 10**6], [0] * 10**5],
    "block_size": [0, -1, 1.5, True, None, "4", 1 << 31, 1 << 64, 10**4000],
    "columns": [
        None,
        [],
        {},
        {"tokens": "ndarray:uint32"},
        {"sum": "uint64"},
        {f"c{i}": "bytes" for i in range(10**5)} | {"tokens": "ndarray:uint32", "sum": "uint64"},
        {"sum": "uint64", "tokens": "bytes"},
        {"sum": "uint64", "tokens": "ndarray:uint32:0"},
        {"sum": "uint64", "tokens": "ndarray:uint32:" + "9" * 20},
        {"sum": "uint64", "tokens": "ndarray:uint32:" + ",".join("1" * 99)},
        {"sum": "uint64", "tokens": "ndarray:uint32:\u0662"},
        {"sum": "uint64", "tokens": "ndarray:float64"},
        {"sum": "uint64", "tokens": "pkl"},
    ],
    "recipe": [None, [], "x", 7],
    "ids_bin": [None, [], {}, {"size": -1, "xxh3": "0" * 16}, {"size": "1", "xxh3": "0" * 16}],
}


@pytest.mark.parametrize("total", [0, -1, True, None, "10", 1.0, 1 << 63, 10**99])
def test_a_plan_with_absurd_values_is_refused(
    hostile: BlockReader, opened: Opened, total: object
) -> None:
    blocks = -(-total // 4) if type(total) is int else 3
    forge(hostile.layout.plan, lambda p: p.update(num_sequences=total, num_blocks=blocks))
    refuse(hostile, opened, r"plan\.json: expected num_sequences")


def test_names_that_look_like_a_blocks_are_told_and_never_read(
    hostile: BlockReader, opened: Opened
) -> None:
    names = [
        "000000.JSON",
        "0.json",
        "000000.json ",
        "000000.json\n",
        "\uff10\uff10\uff10\uff10\uff10\uff10.json",
        "0000000.json",
        "\x1b[31m000000.json",
        "-00001.json",
        ".000000.json",
        "000000.json~",
    ]
    for name in names:
        (hostile.layout.blocks / name).write_bytes(hostile.layout.marker(1).read_bytes())
    with contextlib.suppress(OSError):  # not every file system takes a name that is no text
        (hostile.layout.blocks / os.fsdecode(b"\xff.json")).write_bytes(b"")
    (hostile.path / "Tokens.json").write_bytes(b"{}")
    (hostile.path / "SHARD.000003.MDS").write_bytes(b"")
    refuse(hostile, opened, "no part of a store")
    findings = verify_store(open_store(hostile.path))
    assert len(findings) >= len(names) + 2
    assert all(f.isascii() and f.isprintable() for f in findings)
    assert open_store(hostile.path).present() == [0, 1, 2]


@pytest.mark.parametrize(
    "change",
    [
        {"block": 1},
        {"sequences": 0},
        {"sequences": -1},
        {"sequences": 10**9},
        {"shard": None},
        {"sequences": "4"},
        {"shard": []},
        {"tokens_xxh3": "x"},
        {"content_hash": None},
        {"statistics": 3},
        {"sequences": True},
        {"sequences": 10**4000},
        {"block": False},
        {"shard": {"file": "shard.000000.mds", "size": 1 << 40, "xxh3": "0" * 16}},
        {"shard": {"file": "shard.000000.mds", "size": -1, "xxh3": "0" * 16}},
        {"shard": {"file": "shard.000000.mds", "size": 470, "xxh3": "0" * 15 + "G"}},
    ],
)
def test_a_marker_with_absurd_values_is_refused(store: BlockReader, change: dict) -> None:
    (store.path / "blocks.bin").unlink()
    forge(store.layout.marker(0), lambda m: m.update(change))
    with pytest.raises(CorruptBlockError, match=r"000000\.json"):
        open_store(store.path)[0]


@pytest.mark.parametrize(
    "name",
    [
        "shard.000000.mds",
        "tokens.json",
        "plan.json",
        "blocks.bin",
        "index.json",
        "ids.bin",
        "blocks/000000.json",
    ],
)
def test_links_pipes_and_folders_are_not_read(
    store: BlockReader, opened: Opened, name: str
) -> None:
    file, elsewhere = store.path / name, store.path.parent / "elsewhere"
    if file.parent == store.layout.blocks:
        store.layout.blocks_bin.unlink()  # else the marker need not be read
    shutil.move(file, elsewhere)
    makes = (partial(file.symlink_to, elsewhere), partial(os.mkfifo, file), file.mkdir)
    for make, kind in zip(makes, ("a link", "another kind", "another kind"), strict=True):
        make()
        read = name in ("shard.000000.mds", "tokens.json", "plan.json", "blocks/000000.json")
        expected = rf"{file.name}: expected a regular file, found {kind}" if read else file.name
        if kind != "a link" and name == "tokens.json":
            expected = "holds no tokens.json"
        refuse(store, opened, expected)
        file.rmdir() if kind != "a link" and file.is_dir() else file.unlink()


def test_a_folder_of_markers_that_is_a_link_is_refused(store: BlockReader) -> None:
    moved = store.path.parent / "moved"
    shutil.move(store.layout.blocks, moved)
    store.layout.blocks.symlink_to(moved)
    with pytest.raises(CorruptBlockError, match="a folder"):
        open_store(store.path)


def test_json_that_is_deep_or_doubled_or_not_canonical_is_refused() -> None:
    deep = b'{"a":' + b"[" * 100 + b"]" * 100
    bodies = [
        b'{"a":' * 100_000,
        deep,
        b'{"a":' + b"[" * 10**6,
        b'{"a":1,"a":2',
        b'{"b":1,"a":2',
        b'{ "a":1',
        b"[1",
        b"",
        b'{"a":NaN',
        b'{"a":Infinity',
        b'{"a":1e999',
        b'{"a":01',
        b'{"a":' + b"9" * 10**5,
        b'{"a":1.0e0',
        b'{"a":"\xff"',
        b'{"a":"\xc3\xa4"',
        b'{"a":-0',
        b'{"a":1 ',
        b'{"xxh3":"0"',
        b"null",
    ]
    for body in bodies:
        tail = f',"xxh3":"{xxhash.xxh3_64_hexdigest(body)}"}}\n'.encode()
        with pytest.raises(CorruptBlockError):
            decode_json(body + tail, file="made up")


def test_entries_that_are_no_part_of_a_store_are_told_and_left_alone(store: BlockReader) -> None:
    (store.path / "notes.txt").write_text("mine")
    (store.layout.blocks / "000001.json.bak").write_text("{")
    findings = verify_store(store)
    assert ["notes.txt" in f or ".bak" in f for f in findings] == [True, True]
    assert (store.path / "notes.txt").read_text() == "mine"
