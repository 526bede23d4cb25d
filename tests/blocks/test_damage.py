"""Damaged, truncated, swapped and hostile stores: found before a wrong sample is returned."""

from __future__ import annotations

import os
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import xxhash

from megadistill.blocks import BlockWriter, open_store
from megadistill.blocks.maintenance.verify import verify_store
from megadistill.errors import CorruptBlockError
from megadistill.storage.files import xxh3_of
from tests.blocks.stores import fill, forge, is_noticed, make_samples, read_all, same_sample

SAMPLES = make_samples(10)


@pytest.fixture
def store(tmp_path: Path) -> BlockWriter:
    return fill(tmp_path / "store", SAMPLES, ids_bin=b"the ranking of ids")


def test_2000_flipped_bits_are_found_before_a_wrong_sample_is_returned(store: BlockWriter) -> None:
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
            read_all(store.path, SAMPLES)  # compares every sample that is returned
        except CorruptBlockError:  # and no other: checksums come before all meaning
            by_reading[kind] += 1
        else:
            assert verify_store(open_store(store.path)) != [], file
            by_verifying[kind] += 1
        file.write_bytes(sound)
    assert verify_store(open_store(store.path)) == []
    assert sum(by_reading.values()) + sum(by_verifying.values()) == 2000
    assert set(by_reading) == {".mds", "store/tokens.json", "store/plan.json"}
    assert set(by_verifying) == {
        "blocks/000000.json",
        "blocks/000001.json",
        "blocks/000002.json",
        "store/blocks.bin",
        "store/ids.bin",
        "store/index.json",
    }


def test_a_flipped_bit_of_a_marker_is_found_by_reading_where_blocks_bin_is_gone(
    store: BlockWriter,
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
            read_all(store.path, SAMPLES)
        marker.write_bytes(sound)


def test_a_cut_or_lengthened_file_is_found(store: BlockWriter) -> None:
    for file in sorted(p for p in store.path.rglob("*") if p.is_file()):
        sound = file.read_bytes()
        for length in {0, 1, 4, len(sound) // 2, len(sound) - 1}:
            file.write_bytes(sound[:length])
            assert is_noticed(store.path, SAMPLES), (file, length)
        file.write_bytes(sound + b"\0")
        assert is_noticed(store.path, SAMPLES), file
        file.write_bytes(sound)


def test_a_shard_cut_at_any_sample_boundary_or_beside_it_is_a_typed_error(
    store: BlockWriter,
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
                    open_store(store.path)[4 * block]
                assert any(shard.name in f for f in verify_store(open_store(store.path)))
                cuts += 1
        shard.write_bytes(sound)
    assert cuts == 3 * (5 + 5 + 3) - 3
    shard = store.layout.shard(1)
    shard.unlink()
    with pytest.raises(CorruptBlockError, match="no file"):
        open_store(store.path)[4]
    with pytest.raises(CorruptBlockError, match=r"shard\.000001\.mds"):
        store.finish()
    assert not store.complete()


def test_the_error_names_file_expected_and_found(store: BlockWriter) -> None:
    shard = store.layout.shard(1)
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    with pytest.raises(CorruptBlockError) as caught:
        open_store(store.path)[7]
    assert caught.value.file == str(shard)
    assert caught.value.expected == f"xxh3 {store.marker(1)['shard']['xxh3']}"
    assert caught.value.found == xxhash.xxh3_64_hexdigest(data)
    assert "\n" not in str(caught.value)


def test_a_shard_is_verified_when_it_is_opened_and_its_samples_at_every_read(
    store: BlockWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed: list[Path] = []

    def counted(handle: int, path: Path) -> int:
        hashed.append(path)
        return xxh3_of(handle, path)

    monkeypatch.setattr("megadistill.blocks.shard.xxh3_of", counted)
    store = open_store(store.path)
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
        open_store(store.path)[0]
    # The records' sums are seeded with the sequence number: a marker that agrees is no way round.
    (store.path / "blocks.bin").unlink()
    theirs = store.marker(1)["shard"]["xxh3"]
    forge(store.layout.marker(0), lambda m: m["shard"].update(xxh3=theirs))
    with pytest.raises(CorruptBlockError, match="sequence 0: expected xxh3"):
        open_store(store.path)[0]


def test_verifying_tells_of_every_damaged_block_and_goes_on(store: BlockWriter) -> None:
    for block in (0, 2):
        shard = store.layout.shard(block)
        shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    seen: list[int] = []
    findings = verify_store(store, workers=2, progress=seen.append)
    assert seen == [0, 1, 2]
    assert [f.split(":")[0][-16:] for f in findings] == ["shard.000000.mds", "shard.000002.mds"]
