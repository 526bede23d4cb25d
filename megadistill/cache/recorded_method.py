"""The method of targets that a cache's recipe names, and the distribution that registers it."""

from __future__ import annotations

from typing import Any, TypeGuard

from megadistill.blocks import BlockReader
from megadistill.errors import CorruptBlockError, StoreError
from megadistill.targets import METHODS, SparseMethod, is_sparse, sparse_method, sparse_names

DISTRIBUTION = "method_distribution"  # the recipe's field; methods of megadistill have none


def method_of(store: BlockReader) -> SparseMethod:
    """Returns the method of a cache.

    Raises StoreError where it is not installed, CorruptBlockError for a recipe that names none.
    """
    header, name = str(store.layout.header("cache")), store.recipe.get("method")
    require_installed(store.recipe, where=header)
    outside = DISTRIBUTION in store.recipe
    if not _is_sparse(name) or (not outside and METHODS.distribution(name) is not None):
        raise CorruptBlockError(header, f"recipe.method, one of {', '.join(sparse_names())}", name)
    return sparse_method(name)


def require_installed(recipe: dict[str, Any], *, where: str) -> None:
    """StoreError where a recipe names a distribution that does not register its method here."""
    name, origin = recipe.get("method"), recipe.get(DISTRIBUTION)
    if origin is None:
        return
    found = METHODS.distribution(name) if _is_sparse(name) else None
    if found is None or found.name != origin:
        instead = f"; {found.name} registers another method of this name" if found else ""
        raise StoreError(
            f"{where}: the method {name} of the distribution {origin} is not installed{instead}: "
            f"install {origin} in this environment"
        )


def _is_sparse(name: Any) -> TypeGuard[str]:
    return isinstance(name, str) and is_sparse(name)


def distribution_of(name: str) -> dict[str, str]:
    """Returns {"method_distribution": name} for a method of another distribution, else {}."""
    found = METHODS.distribution(name)
    return {} if found is None else {DISTRIBUTION: found.name}


def version_of(name: str) -> dict[str, Any]:
    """Returns {distribution: version} for a method of another distribution, else {}."""
    found = METHODS.distribution(name)
    return {} if found is None else {found.name: found.version}
