"""The registered methods of targets by name: megadistill's own, and those of entry points.

A name stands for one object, a `targets.method.Method`, in one file of targets/methods/. Objects
are imported at first use. Another distribution registers its method with an entry point
`method.NAME` of the group `megadistill`; see targets/method.py for what the object has.
"""

from __future__ import annotations

from typing import Any

from megadistill.registry import Registry

_SPARSE = {
    "varopt": "megadistill.targets.methods.varopt:VAROPT",
    "multinomial": "megadistill.targets.methods.multinomial:MULTINOMIAL",
    "topk": "megadistill.targets.methods.topk:TOPK",
    "topp": "megadistill.targets.methods.topp:TOPP",
}
# Need an online teacher: their targets cannot be cached.
_ONLINE = {
    "union": "megadistill.targets.methods.union:UNION",
    "exact": "megadistill.targets.methods.exact:EXACT",
    "projected": "megadistill.targets.methods.projected:PROJECTED",
}

METHODS: Registry[Any] = Registry(
    "method", {**_SPARSE, **_ONLINE}, base="megadistill.targets.method:SparseMethod"
)


def sparse_names() -> tuple[str, ...]:
    """Names of the methods whose targets are sparse and can be cached. Imports nothing."""
    return tuple(name for name in METHODS.names() if name not in _ONLINE)


def is_sparse(name: str) -> bool:
    """Whether a method of sparse targets is registered under the name. Imports nothing."""
    return name in METHODS and name not in _ONLINE


def own_sparse_names() -> tuple[str, ...]:
    """Names of megadistill's own methods of sparse targets."""
    return tuple(_SPARSE)
