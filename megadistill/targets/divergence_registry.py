"""Divergences by name: `loss.divergence` of a configuration, `divergence=` of the loss.

The objects stand in student/loss/divergences/, a file each. Names are known without importing them,
so that a configuration is read without torch. Another distribution adds a divergence through an
entry point `divergence.NAME` of the group `megadistill`, see registry.py.
"""

from __future__ import annotations

from typing import Any

from megadistill.registry import Registry

_PACKAGE = "megadistill.student.loss.divergences"

DIVERGENCES: Registry[Any] = Registry(
    "divergence",
    {
        "forward_kl": f"{_PACKAGE}.kl:FORWARD_KL",
        "reverse_kl": f"{_PACKAGE}.kl:REVERSE_KL",
        "jsd": f"{_PACKAGE}.jsd:JSD",
        "skewed_kl": f"{_PACKAGE}.skewed_kl:SKEWED_KL",
        "skewed_reverse_kl": f"{_PACKAGE}.skewed_kl:SKEWED_REVERSE_KL",
        "tvd": f"{_PACKAGE}.tvd:TVD",
        "adaptive_kl": f"{_PACKAGE}.adaptive_kl:ADAPTIVE_KL",
    },
    base=f"{_PACKAGE}.divergence:Divergence",
)
