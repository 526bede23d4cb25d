"""The data sources that `data.source` names: megadistill's own, and those of entry points.

A name stands for one object, a `data.sources.base.Source`, in one file of data/sources/. Names are
known without importing the object. Another distribution registers its source with an entry point
`source.NAME` of the group `megadistill`.
"""

from __future__ import annotations

from typing import Any

from megadistill.registry import Registry

SOURCES: Registry[Any] = Registry(
    "source",
    {"python-stdlib": "megadistill.data.sources.stdlib:STANDARD_LIBRARY"},
    base="megadistill.data.sources.base:Source",
)
