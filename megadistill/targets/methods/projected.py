"""projected: the teacher's hidden states through a learned matrix and the student's head.

Needs an online teacher.
"""

from __future__ import annotations

from megadistill.targets.method import Method


class Projected(Method):
    """Hidden states of a teacher with another tokenizer."""

    name = "projected"
    own_tokenizer = True


PROJECTED = Projected()
