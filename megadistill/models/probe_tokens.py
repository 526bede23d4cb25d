"""The random tokens on which a model is compared with another, or with itself.

T sequence length.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Probe:
    """Random document, and a sequence of several documents, each a prefix of that one.

    tokens_T     int64 [T]: one document of random tokens, equal on every rank
    starts       int64 [D]: where the documents of the second sequence start
    positions_T  int64 [T]: the position of each token of the second sequence within its document
    """

    tokens_T: np.ndarray
    starts: np.ndarray
    positions_T: np.ndarray

    @classmethod
    def of(cls, *, seq_len: int, vocab_size: int, seed: int = 0) -> Probe:
        """Documents of T/2, T/4, 1, 2, 4, ... tokens: short ones lie late in the sequence.

        seed: of the tokens. The documents are the same for each.
        """
        tokens_T = np.random.default_rng(seed).integers(0, vocab_size, seq_len)
        lengths, short = [max(1, seq_len // 2), seq_len // 4], 1
        while sum(lengths) < seq_len:
            lengths.append(min(short, seq_len - sum(lengths)))
            short = short * 2 if short * 8 < seq_len else 1
        lengths = [length for length in lengths if length]
        starts = np.cumsum([0, *lengths[:-1]])
        positions_T = np.concatenate([np.arange(length) for length in lengths])[:seq_len]
        return cls(tokens_T, starts, positions_T)

    @property
    def packed_T(self) -> np.ndarray:
        """int64 [T]: the second sequence."""
        return self.tokens_T[self.positions_T]
