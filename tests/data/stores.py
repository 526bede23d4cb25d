"""Comparing stores."""

import filecmp
from pathlib import Path


def same_store(a, b):
    """Whether two stores are equal byte for byte."""

    def listing(folder):
        return sorted(p.relative_to(folder) for p in Path(folder).rglob("*") if p.is_file())

    names = listing(a)
    return names == listing(b) and not any(filecmp.cmpfiles(a, b, names, shallow=False)[1:])
