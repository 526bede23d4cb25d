"""Methods are objects: nothing else in the package tells them apart by name."""

from __future__ import annotations

import ast
from pathlib import Path

import numpy as np
import pytest

from megadistill.targets import METHODS, SparseMethod, find_method, sparse_method, sparse_names
from tests.cache.targets import METHODS as OWN
from tests.cache.targets import SAMPLED

PACKAGE = Path(__file__).parents[2] / "megadistill"
ONLINE = ("union", "exact", "projected")
# The registry, the methods themselves, and choices of one method: a default, the held-out cache's,
# the one that serves every loss, and the benchmarks'.
NAMED_IN = {
    "config/generating.py": {"varopt"},
    "config/held_out.py": {"topk"},
    "config/rules.py": {"topk"},
    "targets/dense.py": {"exact", "union"},
}
PARAMETERS = {
    "varopt": {"tau": 0.06},
    "multinomial": {"draws": 50},
    "topk": {"k": 64},
    "topp": {"p": 0.95, "k": 64},
}


def test_no_other_module_names_a_method():
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        place = path.relative_to(PACKAGE).as_posix()
        if place.startswith(("bench/", "targets/methods/")) or place == "targets/registered.py":
            continue
        constants = {
            node.value
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Constant) and isinstance(node.value, str)
        }
        named = constants & {*OWN, *ONLINE}
        if named:
            found[place] = named
    assert found == NAMED_IN


def test_every_registered_object_has_the_name_it_is_registered_by():
    assert METHODS.names() == (*OWN, *ONLINE)
    assert sparse_names() == OWN
    for name in METHODS.names():
        method = find_method(name)
        assert method.name == name
        assert method.cached == isinstance(method, SparseMethod) == (name in OWN)
        assert method.sampled == (name in SAMPLED)


@pytest.mark.parametrize("name", OWN)
def test_a_position_is_expected_to_have_no_more_than_the_most(name):
    method = sparse_method(name)
    values = PARAMETERS[name]
    assert 1 <= method.expected_entries(values) <= method.largest_entries(values)


def test_the_largest_bytes_count_an_id_by_the_vocabulary_and_no_entry_above_it():
    topk = sparse_method("topk")
    # 16 for the position; an entry is a float32 and an id of 2, 3 or 4 bytes.
    assert topk.largest_bytes({"k": 9}) == 16 + 10 * 8
    assert topk.largest_bytes({"k": 9}, vocab_size=1 << 16) == 16 + 10 * 6
    assert topk.largest_bytes({"k": 9}, vocab_size=(1 << 16) + 1) == 16 + 10 * 7
    assert topk.largest_bytes({"k": 9}, vocab_size=(1 << 24) + 1) == 16 + 10 * 8
    assert topk.largest_bytes({"k": 9}, vocab_size=5) == 16 + 5 * 6


@pytest.mark.parametrize("name", OWN)
def test_the_worst_row_stays_within_the_largest_bytes(name):
    """Ids far apart, weights without order: what deflating cannot shorten."""
    from megadistill import encode_targets
    from megadistill.targets import SparseTargets

    method, vocab_size, N = sparse_method(name), 1 << 24, 200
    values = {"tau": 0.1, "draws": 20, "k": 10, "p": 1.0}
    K = method.largest_entries(values)
    rng = np.random.default_rng(0)
    ids_NK = np.stack([rng.choice(vocab_size, K, replace=False) for _ in range(N)])
    weights_NK = np.full((N, K), 1 / K)
    if name in ("topk", "topp"):
        weights_NK = np.sort(rng.dirichlet(np.ones(K), N))[:, ::-1]
    targets = SparseTargets(
        offsets=np.arange(N + 1) * K,
        ids=ids_NK.ravel(),
        weights=weights_NK.ravel().astype(np.float32),
        tail=np.zeros(N, np.float32),
        method=name,
        entropy=rng.exponential(2, N).astype(np.float32),
        nll=rng.exponential(2, N).astype(np.float32),
        heads=np.full(N, K // 2) if name == "varopt" else None,
    )
    size = len(encode_targets(targets, vocab_size=vocab_size))
    assert size < N * method.largest_bytes(values, vocab_size=vocab_size)
