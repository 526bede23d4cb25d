"""topk: the k most probable ids, the mass of the others, and the true id."""

from __future__ import annotations

from megadistill.targets.method import Values
from megadistill.targets.methods.listed import Listed


class Topk(Listed):
    """The k most probable ids."""

    name, byte = "topk", 2
    parameters = ("k",)
    bytes_an_entry, bytes_per_position = 2.1, 4.4
    retruncated_by = ("k",)

    def expected_entries(self, values: Values) -> float:
        """Returns k, and the true id for every fifth position."""
        return float(values["k"] + 0.2)


TOPK = Topk()
