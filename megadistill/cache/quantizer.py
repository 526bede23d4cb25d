"""Entropy and nll in one byte each: the level table, part of the format.

Code c stands for exactly c * c / 2048 nats, c = 0 to 254: 0 to 31.5 nats, every level a float32
without rounding. Code 255 stands for nan, "there is none". A value goes to the code nearest in the
square root, which is off by at most sqrt(value) / 45 nats (0.03 at 2 nats); above 31.5 nats it is
cut to 31.5. Averages over many positions are far closer than that, since the errors cancel.
"""

from __future__ import annotations

import numpy as np

NONE = 255
LEVELS = np.append(np.arange(255, dtype=np.float32) ** 2 / np.float32(2048), np.float32(np.nan))
# Numerators of the levels: sums of them are exact integers, in units of 1/2048 nat.
NUMERATORS = [c * c for c in range(255)]
UNIT = 2048


def to_codes(values: np.ndarray) -> np.ndarray:
    """uint8 codes of values in nats; nan becomes 255. Negative values count as 0."""
    with np.errstate(invalid="ignore"):
        roots = np.sqrt(np.maximum(values.astype(np.float64), 0) * UNIT)
    codes = np.minimum(np.rint(np.nan_to_num(roots, nan=0.0, posinf=NONE - 1)), NONE - 1)
    return np.where(np.isnan(values), NONE, codes).astype(np.uint8)
