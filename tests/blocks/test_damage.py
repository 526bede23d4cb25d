"""Damaged, truncated, swapped and hostile stores: found before a wrong sample is returned."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import sys
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import xxhash

from megadistill.blocks import BlockStore
from megadistill.blocks.files import xxh3_of
from megadistill.blocks.records import decode_json, encode_json, read_json
from megadistill.errors import CorruptBlockError, StoreError
from tests.blocks.stores import fill, make_samples, same_sample

SAMPLES = make_samples(10)


@pytest.fixture
def store(tmp_path: Path) -> BlockStore:
    return fill(tmp_path / "store", SAMPLES, ids_bin=b"the ranking of ids")


def read_all(path: Path) -> None:
    """Every sample, compared with what was written. One of our errors, or all is right."""
    store = BlockStore.open(path)
    for index in range(len(store)):
        assert same_sample(store[index], SAMPLES[index])


def is_noticed(path: Path) -> bool:
    """Whether verifying tells of damage. Reading may only err, or return the right samples."""
    try:
        read_all(path)
        return bool(BlockStore.open(path).verify())
    except StoreError:
        return True


def test_2000_flipped_bits_are_found_before_a_wrong_sample_is_returned(store: BlockStore) -> None:
    """Reading finds those of shards, header and plan.

    It needs neither index.json nor ids.bin, and markers and blocks.bin say the same thing twice:
    verifying finds those.
    """
    rng = random.Random(0)
    files = sorted(p for p in store.path.rglob("*") if p.is_file())
    by_reading, by_verifying = Counter(), Counter()
    for turn in range(2000):
        file = files[turn % len(files)]
        sound = file.read_bytes()
        flipped = bytearray(sound)
        flipped[rng.randrange(len(sound))] ^= 1 << rng.randrange(8)
        file.write_bytes(flipped)
        kind = file.suffix if file.suffix == ".mds" else file.parent.name + "/" + file.name
        try:
            read_all(store.path)  # compares every sample that is returned
        except CorruptBlockError:  # and no other: checksums come before all meaning
            by_reading[kind] += 1
        else:
            assert BlockStore.open(store.path).verify() != [], file
            by_verifying[kind] += 1
        file.write_bytes(sound)
    assert BlockStore.open(store.path).verify() == []
    assert sum(by_reading.values()) + sum(by_verifying.values()) == 2000
    assert set(by_reading) == {".mds", "store/tokens.json", "store/plan.json"}
    assert set(by_verifying) == {
        "blocks/000000.json", "blocks/000001.json", "blocks/000002.json", "store/blocks.bin",
        "store/ids.bin", "store/index.json",
    }  # fmt: skip


def test_a_flipped_bit_of_a_marker_is_found_by_reading_where_blocks_bin_is_gone(
    store: BlockStore,
) -> None:
    (store.path / "blocks.bin").unlink()
    rng = random.Random(0)
    for turn in range(90):
        marker = store.layout.marker(turn % 3)
        sound = marker.read_bytes()
        flipped = bytearray(sound)
        flipped[rng.randrange(len(sound))] ^= 1 << rng.randrange(8)
        marker.write_bytes(flipped)
        with pytest.raises(CorruptBlockError, match=marker.name):
            read_all(store.path)
        marker.write_bytes(sound)


def test_a_cut_or_lengthened_file_is_found(store: BlockStore) -> None:
    for file in sorted(p for p in store.path.rglob("*") if p.is_file()):
        sound = file.read_bytes()
        for length in {0, 1, 4, len(sound) // 2, len(sound) - 1}:
            file.write_bytes(sound[:length])
            assert is_noticed(store.path), (file, length)
        file.write_bytes(sound + b"\0")
        assert is_noticed(store.path), file
        file.write_bytes(sound)


def test_a_shard_cut_at_any_sample_boundary_or_beside_it_is_a_typed_error(
    store: BlockStore,
) -> None:
    cuts = 0
    for block in range(3):
        shard = store.layout.shard(block)
        sound = shard.read_bytes()
        samples = int.from_bytes(sound[:4], "little")
        for boundary in np.frombuffer(sound, "<u4", samples + 1, 4).tolist():
            for length in (boundary - 1, boundary, boundary + 1):
                if length == len(sound):
                    continue
                shard.write_bytes(sound[:length].ljust(length, b"\0"))
                with pytest.raises(CorruptBlockError, match=f"{shard.name}: expected {len(sound)}"):
                    BlockStore.open(store.path)[4 * block]
                assert any(shard.name in f for f in BlockStore.open(store.path).verify())
                cuts += 1
        shard.write_bytes(sound)
    assert cuts == 3 * (5 + 5 + 3) - 3
    shard = store.layout.shard(1)
    shard.unlink()
    with pytest.raises(CorruptBlockError, match="no file"):
        BlockStore.open(store.path)[4]
    with pytest.raises(CorruptBlockError, match=r"shard\.000001\.mds"):
        store.finish()
    assert not store.complete()


def test_the_error_names_file_expected_and_found(store: BlockStore) -> None:
    shard = store.layout.shard(1)
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    with pytest.raises(CorruptBlockError) as caught:
        BlockStore.open(store.path)[7]
    assert caught.value.file == str(shard)
    assert caught.value.expected == f"xxh3 {store.marker(1)['shard']['xxh3']}"
    assert caught.value.found == xxhash.xxh3_64_hexdigest(data)
    assert "\n" not in str(caught.value)


def test_a_shard_is_verified_when_it_is_opened_and_its_samples_at_every_read(
    store: BlockStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed: list[Path] = []

    def counted(handle: int, path: Path) -> int:
        hashed.append(path)
        return xxh3_of(handle, path)

    monkeypatch.setattr("megadistill.blocks.shard.xxh3_of", counted)
    store = BlockStore.open(store.path)
    shard = store.layout.shard(1)
    assert same_sample(store[4], SAMPLES[4])
    assert same_sample(store[5], SAMPLES[5])
    store._shards.drop(1)  # as when more blocks are read from than are kept open
    assert same_sample(store[4], SAMPLES[4])
    assert hashed == [shard]
    sound = shard.read_bytes()
    with shard.open("r+b") as file:  # rewritten underneath, behind an open shard
        file.seek(-1, os.SEEK_END)
        file.write(bytes([sound[-1] ^ 1]))
    assert same_sample(store[4], SAMPLES[4])
    with pytest.raises(CorruptBlockError, match="sequence 7: expected xxh3"):
        store[7]
    os.truncate(shard, len(sound) - 20)  # a memory map would end the process here
    with pytest.raises(CorruptBlockError, match=rf"expected {len(sound)} bytes, found"):
        store[7]
    store._shards.drop(1)
    shard.write_bytes(sound[:-1] + bytes([sound[-1] ^ 1]))
    with pytest.raises(CorruptBlockError, match=r"shard\.000001\.mds: expected xxh3"):
        store[4]  # another file now: verified anew, though sample 4 of it is right
    assert hashed == [shard, shard]


def test_shards_in_each_others_place_are_found_by_reading(tmp_path: Path) -> None:
    store = fill(tmp_path / "store", [SAMPLES[0]] * 8)  # equal samples, equal sizes
    first, second = store.layout.shard(0), store.layout.shard(1)
    os.rename(first, tmp_path / "spare")
    os.rename(second, first)
    os.rename(tmp_path / "spare", second)
    with pytest.raises(CorruptBlockError, match=r"shard\.000000\.mds: expected xxh3"):
        BlockStore.open(store.path)[0]
    # The records' sums are seeded with the sequence number: a marker that agrees is no way round.
    (store.path / "blocks.bin").unlink()
    theirs = store.marker(1)["shard"]["xxh3"]
    forge(store.layout.marker(0), lambda m: m["shard"].update(xxh3=theirs))
    with pytest.raises(CorruptBlockError, match="sequence 0: expected xxh3"):
        BlockStore.open(store.path)[0]


NAMES = [
    "../secret", "../../secret", "/etc/passwd", "//etc/passwd", "..", ".", "./", "", "/",
    "~/secret",
    "./shard.000000.mds", "../store/shard.000000.mds", "shard.000000.mds/../../secret",
    "blocks/../../secret", "blocks/000000.json", "tokens.json", "shard.000001.mds",
    "shard.000000.mds\0", "shard.000000.mds\0../secret", "shard.000000.mds ", " shard.000000.mds",
    "shard.000000.mds\n", "SHARD.000000.MDS", "Shard.000000.mds", "shard.0.mds",
    "shard.00000000000.mds", "shard.-00001.mds", "shard.000000.mds.zstd", "file:///etc/passwd",
    "http://localhost/secret", "\\\\host\\share", "..\\secret", "C:secret", "%2e%2e/secret",
    "\u2024\u2024/secret", "shard\u2024000000\u2024mds", "\u202eshard.000000.mds",
    "shard.\uff10\uff10\uff10\uff10\uff10\uff10.mds", "shard.00000\u0660.mds", "\ud800", "a" * 5000,
    "a/" * 3000, "/dev/zero", "/dev/stdin", "/proc/self/environ", "pipe", "link", "device",
    7, None, True, ["shard.000000.mds"], {"file": "shard.000000.mds"},
]  # fmt: skip


class Opened:
    """Every path that this process opens or lists while it is watched."""

    def __init__(self) -> None:
        self.paths: list[str] | None = None

    def __call__(self, event: str, args: tuple) -> None:
        watched = self.paths is not None and event in ("open", "os.listdir", "os.scandir")
        if watched and not isinstance(args[0], int):  # a file that is open already
            self.paths.append(os.fsdecode(args[0]))


@pytest.fixture(scope="module")
def opened() -> Opened:
    hook = Opened()
    sys.addaudithook(hook)  # cannot be removed again; watches only when asked to
    return hook


@pytest.fixture
def hostile(store: BlockStore) -> BlockStore:
    """A store with things around and inside that must not be opened."""
    (store.path.parent / "secret").write_bytes(store.layout.shard(0).read_bytes())
    os.mkfifo(store.path / "pipe")
    (store.path / "link").symlink_to("../secret")
    (store.path / "device").symlink_to("/dev/zero")
    return store


def read_and_verify(path: Path) -> None:
    read_all(path)
    raise StoreError("; ".join(BlockStore.open(path).verify()))


def refuse(store: BlockStore, opened: Opened, match: str) -> None:
    """Reading, or else verifying, refuses the store, and nothing outside it is opened."""
    opened.paths = []
    try:
        with pytest.raises(StoreError, match=match) as caught:
            read_and_verify(store.path)
        assert len(str(caught.value)) < 2500
    finally:
        paths, opened.paths = opened.paths, None
    inside = (str(store.path), f"{store.path}.run", sys.prefix, sys.base_prefix)
    assert paths
    assert [p for p in paths if not p.startswith(inside) or ".." in p] == []


@pytest.mark.parametrize("name", NAMES)
def test_a_marker_that_names_another_file_is_refused(
    hostile: BlockStore, opened: Opened, name: object
) -> None:
    (hostile.path / "blocks.bin").unlink()
    forge(hostile.layout.marker(0), lambda m: m["shard"].update(file=name))
    refuse(hostile, opened, r"000000\.json: expected shard: file shard\.000000\.mds")


def test_an_index_that_names_another_file_is_refused(hostile: BlockStore, opened: Opened) -> None:
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
    hostile: BlockStore, opened: Opened
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


ABSURD: dict[str, list] = {
    "format_version": [0, 2, -1, 1.0, "1", True, None, 10**4000, "9" * 10**6],
    "features": [["zstd"], "zstd", None, {}, [[]], ["x" * 10**6], [0] * 10**5],
    "block_size": [0, -1, 1.5, True, None, "4", 1 << 31, 1 << 64, 10**4000],
    "columns": [
        None, [], {}, {"tokens": "ndarray:uint32"}, {"sum": "uint64"},
        {f"c{i}": "bytes" for i in range(10**5)} | {"tokens": "ndarray:uint32", "sum": "uint64"},
        {"sum": "uint64", "tokens": "bytes"}, {"sum": "uint64", "tokens": "ndarray:uint32:0"},
        {"sum": "uint64", "tokens": "ndarray:uint32:" + "9" * 20},
        {"sum": "uint64", "tokens": "ndarray:uint32:" + ",".join("1" * 99)},
        {"sum": "uint64", "tokens": "ndarray:uint32:\u0662"},
        {"sum": "uint64", "tokens": "ndarray:float64"}, {"sum": "uint64", "tokens": "pkl"},
    ],
    "recipe": [None, [], "x", 7],
    "ids_bin": [None, [], {}, {"size": -1, "xxh3": "0" * 16}, {"size": "1", "xxh3": "0" * 16}],
}  # fmt: skip


@pytest.mark.parametrize("total", [0, -1, True, None, "10", 1.0, 1 << 63, 10**99])
def test_a_plan_with_absurd_values_is_refused(
    hostile: BlockStore, opened: Opened, total: object
) -> None:
    blocks = -(-total // 4) if type(total) is int else 3
    forge(hostile.layout.plan, lambda p: p.update(num_sequences=total, num_blocks=blocks))
    refuse(hostile, opened, r"plan\.json: expected num_sequences")


def test_names_that_look_like_a_blocks_are_told_and_never_read(
    hostile: BlockStore, opened: Opened
) -> None:
    names = [
        "000000.JSON", "0.json", "000000.json ", "000000.json\n",
        "\uff10\uff10\uff10\uff10\uff10\uff10.json",
        "0000000.json", "\x1b[31m000000.json", "-00001.json", ".000000.json", "000000.json~",
    ]  # fmt: skip
    for name in names:
        (hostile.layout.blocks / name).write_bytes(hostile.layout.marker(1).read_bytes())
    with contextlib.suppress(OSError):  # not every file system takes a name that is no text
        (hostile.layout.blocks / os.fsdecode(b"\xff.json")).write_bytes(b"")
    (hostile.path / "Tokens.json").write_bytes(b"{}")
    (hostile.path / "SHARD.000003.MDS").write_bytes(b"")
    refuse(hostile, opened, "no part of a store")
    findings = BlockStore.open(hostile.path).verify()
    assert len(findings) >= len(names) + 2
    assert all(f.isascii() and f.isprintable() for f in findings)
    assert BlockStore.open(hostile.path).present() == [0, 1, 2]


@pytest.mark.parametrize(
    "change",
    [
        {"block": 1}, {"sequences": 0}, {"sequences": -1}, {"sequences": 10**9}, {"shard": None},
        {"sequences": "4"}, {"shard": []}, {"tokens_xxh3": "x"}, {"content_hash": None},
        {"statistics": 3}, {"sequences": True}, {"sequences": 10**4000}, {"block": False},
        {"shard": {"file": "shard.000000.mds", "size": 1 << 40, "xxh3": "0" * 16}},
        {"shard": {"file": "shard.000000.mds", "size": -1, "xxh3": "0" * 16}},
        {"shard": {"file": "shard.000000.mds", "size": 470, "xxh3": "0" * 15 + "G"}},
    ],
)  # fmt: skip
def test_a_marker_with_absurd_values_is_refused(store: BlockStore, change: dict) -> None:
    (store.path / "blocks.bin").unlink()
    forge(store.layout.marker(0), lambda m: m.update(change))
    with pytest.raises(CorruptBlockError, match=r"000000\.json"):
        BlockStore.open(store.path)[0]


def test_links_pipes_and_folders_are_not_read(store: BlockStore) -> None:
    for file in (store.layout.shard(0), store.layout.marker(0), store.layout.blocks_bin):
        elsewhere = store.path.parent / "elsewhere"
        shutil.move(file, elsewhere)
        for make in (partial(file.symlink_to, elsewhere), partial(os.mkfifo, file), file.mkdir):
            make()
            assert is_noticed(store.path), file
            file.rmdir() if file.is_dir() and not file.is_symlink() else file.unlink()
        shutil.move(elsewhere, file)
    moved = store.path.parent / "moved"
    shutil.move(store.layout.blocks, moved)
    store.layout.blocks.symlink_to(moved)
    with pytest.raises(CorruptBlockError, match="a folder"):
        BlockStore.open(store.path)


def test_json_that_is_deep_or_doubled_or_not_canonical_is_refused() -> None:
    deep = b'{"a":' + b"[" * 100 + b"]" * 100
    bodies = [
        b'{"a":' * 100_000, deep, b'{"a":' + b"[" * 10**6, b'{"a":1,"a":2', b'{"b":1,"a":2',
        b'{ "a":1', b"[1", b"", b'{"a":NaN', b'{"a":Infinity', b'{"a":1e999', b'{"a":01',
        b'{"a":' + b"9" * 10**5, b'{"a":1.0e0', b'{"a":"\xff"', b'{"a":"\xc3\xa4"', b'{"a":-0',
        b'{"a":1 ', b'{"xxh3":"0"', b"null",
    ]  # fmt: skip
    for body in bodies:
        tail = f',"xxh3":"{xxhash.xxh3_64_hexdigest(body)}"}}\n'.encode()
        with pytest.raises(CorruptBlockError):
            decode_json(body + tail, file="made up")


def test_entries_that_are_no_part_of_a_store_are_told_and_left_alone(store: BlockStore) -> None:
    (store.path / "notes.txt").write_text("mine")
    (store.layout.blocks / "000001.json.bak").write_text("{")
    findings = store.verify()
    assert ["notes.txt" in f or ".bak" in f for f in findings] == [True, True]
    assert (store.path / "notes.txt").read_text() == "mine"


def test_verifying_tells_of_every_damaged_block_and_goes_on(store: BlockStore) -> None:
    for block in (0, 2):
        shard = store.layout.shard(block)
        shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    seen: list[int] = []
    findings = store.verify(workers=2, progress=seen.append)
    assert seen == [0, 1, 2]
    assert [f.split(":")[0][-16:] for f in findings] == ["shard.000000.mds", "shard.000002.mds"]


def forge(file: Path, change: object) -> None:
    """Change a JSON file and give it a right checksum, as an attacker would."""
    record = {k: v for k, v in read_json(file).items() if k != "xxh3"}
    change(record)  # type: ignore[operator]
    file.write_bytes(encode_json(record))
