"""Targets: what is kept of a teacher's distributions, and the methods that choose it.

    sparse.py         SparseTargets, ragged rows of (token id, weight)
    method.py         what a method is: an object that everything else asks
    registered.py     the methods by name; entry points of other distributions
    methods/          a file for each method
    streams/          streams of numbers as bytes, which the methods' codecs are made of
    distributions.py  a rank's slice of the teacher's distributions, which methods select from
    kinds.py          the protocol of all kinds of targets: SparseTargets, and those of
                      dense.py, projected.py and ensemble.py
    compatibility.py  which divergences and temperatures the targets of a method serve

Importing this costs no torch.
"""

from megadistill.targets.compatibility import check_divergence, divergence_name
from megadistill.targets.divergence_registry import DIVERGENCES
from megadistill.targets.method import Method, SparseMethod, find_method, sparse_method
from megadistill.targets.registered import METHODS, is_sparse, sparse_names
from megadistill.targets.sparse import PER_POSITION, SparseTargets, concatenate

__all__ = [
    "DIVERGENCES",
    "METHODS",
    "PER_POSITION",
    "Method",
    "SparseMethod",
    "SparseTargets",
    "check_divergence",
    "concatenate",
    "divergence_name",
    "find_method",
    "is_sparse",
    "sparse_method",
    "sparse_names",
]
