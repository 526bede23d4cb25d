"""Hash of a block's content, in integers: equal for every writer and library version.

A shard's bytes depend on how its symbols were deflated, which zlib does not promise to keep. The
content hash covers the integers below that: token ids, documents, masks, and the targets' own
ids, counts and level codes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import xxhash

from megadistill.cache.codec import content


def content_hash(samples: list[dict[str, Any]], *, file: str = "targets") -> str:
    """xxh3_64, hexadecimal, over a block's samples; `targets` are bytes. CorruptBlockError."""
    digest = xxhash.xxh3_64()
    for sample in samples:
        for name in ("tokens", "documents", "loss_mask"):
            if name in sample:
                part = np.ascontiguousarray(sample[name]).tobytes()
                digest.update(len(part).to_bytes(8, "little") + part)
        if "padding" in sample:
            digest.update(int(sample["padding"]).to_bytes(8, "little"))
        part = content(sample["targets"], file=file)
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()
