"""union: the k most probable ids of the teacher, the k of the student, and the rest.

Needs an online teacher.
"""

from __future__ import annotations

from megadistill.targets.method import Method


class Union(Method):
    """The most probable ids of both sides."""

    name = "union"
    parameters = ("k",)
    whole_head = True


UNION = Union()
