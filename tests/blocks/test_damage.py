"""Damaged, truncated, swapped and hostile stores: found before a wrong sample is returned."""

from __future__ import annotations

import os
import random
import shutil
from functools import partial
from pathlib import Path

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
    return fill(tmp_path / "store", SAMPLES)


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


def test_a_flipped_bit_anywhere_is_found(store: BlockStore) -> None:
    rng = random.Random(0)
    files = sorted(p for p in store.path.rglob("*") if p.is_file())
    for turn in range(400):
        file = files[turn % len(files)]
        sound = file.read_bytes()
        flipped = bytearray(sound)
        flipped[rng.randrange(len(sound))] ^= 1 << rng.randrange(8)
        file.write_bytes(flipped)
        assert is_noticed(store.path), file
        file.write_bytes(sound)
    assert BlockStore.open(store.path).verify() == []


def test_a_cut_or_lengthened_file_is_found(store: BlockStore) -> None:
    for file in sorted(p for p in store.path.rglob("*") if p.is_file()):
        sound = file.read_bytes()
        for length in {0, 1, 4, len(sound) // 2, len(sound) - 1}:
            file.write_bytes(sound[:length])
            assert is_noticed(store.path), (file, length)
        file.write_bytes(sound + b"\0")
        assert is_noticed(store.path), file
        file.write_bytes(sound)


def test_a_shard_cut_at_a_sample_boundary_is_a_typed_error(store: BlockStore) -> None:
    shard = store.layout.shard(1)
    sound = shard.read_bytes()
    offsets = [int.from_bytes(sound[4 * i : 4 * i + 4], "little") for i in range(1, 6)]
    for boundary in offsets:
        for length in (boundary - 1, boundary, boundary + 1):
            if length != len(sound):
                shard.write_bytes(sound[:length].ljust(length, b"\0"))
                with pytest.raises(CorruptBlockError, match=r"shard\.000001\.mds"):
                    BlockStore.open(store.path)[4]
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


@pytest.mark.parametrize(
    "name",
    [
        "../secret", "/etc/passwd", "..", ".", "", "shard.000001.mds", "blocks/../../secret",
        "shard.000000.mds/../../secret", "shard.000000.mds\0", "SHARD.000000.MDS", "~/secret",
        "file:///etc/passwd", "shard.0.mds", "shard.00000000000.mds", "\\\\host\\share", 7, None,
        ["shard.000000.mds"], "shard.000000.mds ", "\u202eshard.000000.mds",
    ],
)  # fmt: skip
def test_a_marker_that_names_another_file_is_refused(store: BlockStore, name: object) -> None:
    (store.path.parent / "secret").write_bytes(store.layout.shard(0).read_bytes())
    (store.path / "blocks.bin").unlink()
    forge(store.layout.marker(0), lambda m: m["shard"].update(file=name))
    with pytest.raises(CorruptBlockError, match=r"000000\.json"):
        BlockStore.open(store.path)[0]


@pytest.mark.parametrize(
    "change",
    [
        {"block": 1}, {"sequences": 0}, {"sequences": -1}, {"sequences": 10**9}, {"shard": None},
        {"sequences": "4"}, {"shard": []}, {"tokens_xxh3": "x"}, {"content_hash": None},
        {"statistics": 3}, {"sequences": True},
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
    for body in (b'{"a":' * 100_000, b'{"a":1,"a":2', b'{"b":1,"a":2', b'{ "a":1', b"[1", b""):
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
