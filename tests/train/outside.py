"""A distribution with a divergence and an optimizer, for training runs."""

import importlib
from pathlib import Path

from tests.outside import installed, make_distribution

MODULE = '''
import torch

from megadistill.student.loss.divergences import Divergence
from megadistill.train.optimizers import Optimizer, parameter_groups


class Hellinger(Divergence):
    """scale / 2 times the sum of (sqrt p - sqrt q)^2."""

    parameters = {"scale": 1.0}
    needs_floor = False

    def terms(self, buckets, parameters, *, has_tail):
        scale, p, q = parameters["scale"], buckets.p.sqrt(), buckets.q.sqrt()
        return scale * (p - q).square() / 2, scale * q * (q - p) / 2


class Momentum(Optimizer):
    options = {"momentum": 0.0}

    def make(self, student, train, options):
        groups = parameter_groups(student, train.weight_decay)
        return torch.optim.SGD(groups, lr=train.lr, momentum=options["momentum"])


HELLINGER, MOMENTUM, WRONG = Hellinger(), Momentum(), "text"
'''
ENTRY_POINTS = {
    "divergence.hellinger": "outside_megadistill:HELLINGER",
    "divergence.wrong": "outside_megadistill:WRONG",
    "divergence.missing": "outside_megadistill_missing:NOTHING",
    "optimizer.momentum": "outside_megadistill:MOMENTUM",
}


def training_distribution(folder):
    return make_distribution(
        Path(folder), "outside-megadistill", ENTRY_POINTS, version="1.2", module=MODULE
    )


def on_ranks(mesh, folder, work, **arguments):
    """`work` ("package.module:name") on a rank where the distribution is installed."""
    module, name = work.split(":")
    with installed(Path(folder)):
        return getattr(importlib.import_module(module), name)(mesh, **arguments)
