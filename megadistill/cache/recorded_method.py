"""The method of targets that a cache's recipe names, and the distribution that registers it."""

from __future__ import annotations

from typing import Any

from megadistill.blocks import BlockReader
from megadistill.errors import CorruptBlockError, StoreError
from megadistill.targets import METHODS, SparseMethod, is_sparse, sparse_method, sparse_names

DISTRIBUTION = "method_distribution"  # the recipe's field; methods of megadistill have none


def method_of(store: BlockReader) -> SparseMethod:
    """Returns the method of a cache.

    Raises StoreError where it is not installed, CorruptBlockError for a recipe that names none.
    """
    name, origin = store.recipe.get("method"), store.recipe.get(DISTRIBUTION)
    header = str(store.layout.header("cache"))
    found = METHODS.distribution(name) if isinstance(name, str) and is_sparse(name) else None
    if origin is not None and (found is None or found.name != origin):
        instead = f"; {found.name} registers another method of this name" if found else ""
        raise StoreError(
            f"{header}: the method {name} of the distribution {origin} is not installed{instead}: "
            f"install {origin} in this environment"
        )
    if not isinstance(name, str) or not is_sparse(name) or (origin is None and found is not None):
        raise CorruptBlockError(header, f"recipe.method, one of {', '.join(sparse_names())}", name)
    return sparse_method(name)


def distribution_of(name: str) -> dict[str, str]:
    """Returns {"method_distribution": name} for a method of another distribution, else {}."""
    found = METHODS.distribution(name)
    return {} if found is None else {DISTRIBUTION: found.name}


def version_of(name: str) -> dict[str, Any]:
    """Returns {distribution: version} for a method of another distribution, else {}."""
    found = METHODS.distribution(name)
    return {} if found is None else {found.name: found.version}
