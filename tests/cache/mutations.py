"""Damage to a cache, from blind to forged: what the fuzzer does to its files.

Blind damage leaves checksums as they were. Forged damage puts every checksum right that stands
above what was changed, so that the code behind the checksums is reached: a JSON value, a record of
blocks.bin, the offsets of a shard, the bytes of one sequence's targets.
"""

from __future__ import annotations

import itertools
import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from megadistill.blocks.columns import decode_record, encode_record, parse_columns
from megadistill.blocks.derived import encode_blocks_bin, encode_index
from megadistill.blocks.shard import shard_config
from megadistill.storage.records import read_json

ODD: list[Any] = [
    0,
    1,
    -1,
    2,
    3,
    5,
    255,
    256,
    1 << 31,
    (1 << 32) - 1,
    1 << 32,
    1 << 63,
    1 << 64,
    10**30,
    10**400,
    0.0,
    -0.0,
    0.5,
    1e308,
    float("nan"),
    float("inf"),
    True,
    False,
    None,
    "",
    "0" * 16,
    "f" * 16,
    "../../etc/passwd",
    "/dev/zero",
    "\0",
    "\ud800",
    "x" * 10_000,
    [],
    {},
    [[]],
    [0] * 10_000,
    {"a": {"b": {}}},
    [None],
    "ndarray:uint32",
    "ndarray:uint8:8",
    "bytes",
    "uint64",
    "topk",
    "varopt",
    "ndarray:uint32:8,1",
    "ndarray:uint64:4",
]


class Cache:
    """A cache in a folder that is damaged and mended again and again."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.sound = {p: p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}
        self.markers = sorted(path.glob("blocks/*.json"))
        self.shards = sorted(path.glob("*.mds"))
        self.columns = parse_columns(read_json(path / "cache.json")["columns"])

    def mend(self) -> None:
        """Bring back every byte."""
        for path in [p for p in self.path.rglob("*") if not p.is_dir()]:
            if path.is_symlink() or path not in self.sound:
                path.unlink()
        for path, data in self.sound.items():
            if not path.exists() or path.read_bytes() != data:
                path.write_bytes(data)

    def damage(self, rng: random.Random) -> bool:
        """Do something to it. Whether whatever is still returned must be what it was."""
        kinds = [
            blind,
            blind,
            file_names,
            json_value,
            json_value,
            binary,
            shard_bytes,
            targets,
            targets,
        ]
        chosen = rng.sample(kinds, 2 if rng.random() < 0.2 else 1)
        for kind in chosen:
            kind(self, rng)
        return all(kind in (blind, file_names) for kind in chosen)


def blind(cache: Cache, rng: random.Random) -> None:
    """One file's bytes, and nothing else."""
    file = rng.choice(list(cache.sound))
    if file.exists():
        file.write_bytes(mutated(file.read_bytes(), rng, list(cache.sound.values())))


def file_names(cache: Cache, rng: random.Random) -> None:
    """Files swapped, copied over each other, or gone."""
    one, other = rng.sample(list(cache.sound), 2)
    if not (one.exists() and other.exists()):
        return
    do = rng.randrange(4)
    if do == 0:
        data = one.read_bytes()
        one.write_bytes(other.read_bytes())
        other.write_bytes(data)
    elif do == 1:
        shutil.copyfile(one, other)
    elif do == 2:
        one.unlink()
    else:
        one.unlink()
        one.symlink_to(other)


def json_value(cache: Cache, rng: random.Random) -> None:
    """A value of a JSON file, with its checksum."""
    names = [p for p in cache.sound if p.suffix == ".json"]
    file = rng.choice(names)
    record = json.loads(cache.sound[file])
    del record["xxh3"]
    if file in cache.markers and rng.random() < 0.5:
        (cache.path / "blocks.bin").unlink(missing_ok=True)  # else its records are believed
    for _ in range(rng.choice((1, 1, 1, 3))):
        replace_value(record, rng)
    file.write_bytes(sealed(record))


def binary(cache: Cache, rng: random.Random) -> None:
    """blocks.bin or ids.bin, with its checksum, in the header for the second."""
    file = cache.path / rng.choice(["blocks.bin", "ids.bin"])
    if file.name == "blocks.bin":
        body = mutated(cache.sound[file][:-8], rng)
        file.write_bytes(body + xxhash.xxh3_64_intdigest(body).to_bytes(8, "little"))
        return
    data = mutated(cache.sound.get(file, b"") or b"\0", rng)
    file.write_bytes(data)
    header = json.loads(cache.sound[cache.path / "cache.json"])
    del header["xxh3"]
    header["ids_bin"] = {"size": len(data), "xxh3": xxhash.xxh3_64_hexdigest(data)}
    (cache.path / "cache.json").write_bytes(sealed(header))


def shard_bytes(cache: Cache, rng: random.Random) -> None:
    """Bytes of a shard: its count, offsets, columns or records; its marker agrees."""
    block = rng.randrange(len(cache.shards))
    data = cache.sound[cache.shards[block]]
    if rng.random() < 0.5:  # the count and the offsets
        at = 4 * rng.randrange(6)
        data = data[:at] + odd_number(rng).to_bytes(4, "little") + data[at + 4 :]
    else:
        data = mutated(data, rng)
    forge_shard(cache, block, data)


def targets(cache: Cache, rng: random.Random) -> None:
    """What one sequence says; its sum, its shard and its marker agree."""
    block = rng.randrange(len(cache.shards))
    marker = read_json_sound(cache, block)
    count, first = marker["sequences"], 4 * block
    samples = samples_of(cache, block, count)
    row = rng.randrange(count)
    sample = samples[row]
    kind = rng.random()
    if kind < 0.7:
        head = bytearray(sample["targets"])
        if rng.random() < 0.5:  # the codec's header, where sizes are declared
            at = rng.randrange(min(24, len(head)))
            head[at : at + 4] = odd_number(rng).to_bytes(4, "little")[: len(head[at : at + 4])]
            sample["targets"] = bytes(head)
        else:
            sample["targets"] = mutated(sample["targets"], rng)
    elif kind < 0.85:
        other = samples[rng.randrange(count)]["targets"]
        cut = rng.randrange(len(other) + 1)
        sample["targets"] = sample["targets"][:cut] + other[cut:]
    else:
        length = rng.choice((1, 2, 9, 300))
        sample["documents"] = np.array([odd_number(rng) for _ in range(length)], np.uint32)
    records = [
        encode_record(cache.columns, s, sequence=first + i)[0] for i, s in enumerate(samples)
    ]
    forge_shard(cache, block, mds(cache, records))


def samples_of(cache: Cache, block: int, count: int) -> list[dict[str, Any]]:
    """The samples of a sound shard."""
    data = cache.sound[cache.shards[block]]
    ends = np.frombuffer(data, "<u4", count + 1, 4).tolist()
    return [
        decode_record(cache.columns, data[a:b], sequence=4 * block + i, file="sound")
        for i, (a, b) in enumerate(itertools.pairwise(ends))
    ]


def mds(cache: Cache, records: list[bytes]) -> bytes:
    """The MDS file that holds these records."""
    config = json.dumps(shard_config(cache.columns), sort_keys=True).encode()
    start = 4 + 4 * (len(records) + 1) + len(config)
    offsets = np.cumsum([start, *map(len, records)]).astype("<u4")
    return len(records).to_bytes(4, "little") + offsets.tobytes() + config + b"".join(records)


def read_json_sound(cache: Cache, block: int) -> dict[str, Any]:
    record = json.loads(cache.sound[cache.markers[block]])
    del record["xxh3"]
    return record


def forge_shard(cache: Cache, block: int, data: bytes) -> None:
    """Put a shard in place, with a marker, blocks.bin and index.json that agree."""
    cache.shards[block].write_bytes(data)
    markers = [read_json_sound(cache, b) for b in range(len(cache.markers))]
    markers[block]["shard"] |= {"size": len(data), "xxh3": xxhash.xxh3_64_hexdigest(data)}
    cache.markers[block].write_bytes(sealed(markers[block]))
    (cache.path / "blocks.bin").write_bytes(encode_blocks_bin(markers))
    (cache.path / "index.json").write_bytes(encode_index(markers, cache.columns))


def sealed(record: Any) -> bytes:
    """A JSON file with a right checksum, whatever it says."""
    body = json.dumps(record, sort_keys=True, separators=(",", ":"))[:-1].encode("ascii")
    return body + f',"xxh3":"{xxhash.xxh3_64_hexdigest(body)}"}}\n'.encode()


def replace_value(record: Any, rng: random.Random) -> None:
    """Walk down to some member, and replace, remove, double or change it."""
    while True:
        keys = list(record) if isinstance(record, dict) else list(range(len(record)))
        if not keys:
            return
        key = rng.choice(keys)
        if isinstance(record[key], dict | list) and record[key] and rng.random() < 0.7:
            record = record[key]
            continue
        break
    do, value = rng.randrange(5), record[key]
    if do == 0 and isinstance(record, dict):
        del record[key]
    elif do == 1 and isinstance(record, dict):
        record[rng.choice(["x", "\0", "a" * 1000, "0", "loss_mask"])] = rng.choice(ODD)
    elif do == 2 and type(value) is int:
        record[key] = value + rng.choice((-1, 1, 1 << 20))
    elif do == 3 and isinstance(value, str) and value:
        at = rng.randrange(len(value))
        record[key] = value[:at] + rng.choice("0f./~\0") + value[at + 1 :]
    else:
        record[key] = rng.choice(ODD)


def odd_number(rng: random.Random) -> int:
    """A number of 32 bits that is likely to go wrong."""
    near = rng.choice((0, 1, 4, 8, 255, 256, 400, 1000, 1 << 16, 1 << 24, 1 << 31, (1 << 32) - 1))
    return max(0, min((1 << 32) - 1, near + rng.randrange(-2, 3)))


def mutated(data: bytes, rng: random.Random, others: list[bytes] | None = None) -> bytes:
    """Bits flipped, bytes cut, inserted, repeated, zeroed, or another file's end put on."""
    if not data:
        return rng.randbytes(rng.choice((1, 8, 100)))
    at = rng.randrange(len(data))
    stop = at + rng.choice((1, 2, 4, 8, 64, 1000))
    do = rng.randrange(7)
    if do == 0:
        flipped = bytearray(data)
        for _ in range(rng.choice((1, 1, 2, 16))):
            flipped[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        return bytes(flipped)
    if do == 1:
        return data[:at]
    if do == 2:
        return data[:at] + data[stop:]
    if do == 3:
        return data[:at] + rng.randbytes(stop - at) + data[at:]
    if do == 4:
        return data[:at] + data[at:stop] * rng.choice((2, 3, 100)) + data[stop:]
    if do == 5:
        return data[:at] + bytes(len(data[at:stop])) + data[stop:]
    other = rng.choice(others or [data])
    return data[:at] + other[rng.randrange(len(other) + 1) :]
