"""Mixtures of experts: which modules they are, and the loss that keeps their routers balanced.

Teacher and student need both to know: under ZeRO-3 a block of experts is gathered as one.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import nn


def expert_blocks(model: nn.Module) -> list[nn.Module]:
    """The modules that route tokens to their experts; none in a dense model."""
    # transformers 4 has a list of modules there, 5 one module of stacked weights.
    return [m for m in model.modules() if isinstance(getattr(m, "experts", None), nn.Module)]


def gather_experts_together(model: nn.Module) -> None:
    """Has ZeRO-3 gather each block of experts as one module. Called before the engine is made.

    Experts without a token on a rank are not called there. If ZeRO-3 gathered them one by one,
    ranks would enter different collectives and hang.
    """
    from deepspeed.utils import set_z3_leaf_module

    for block in expert_blocks(model):
        set_z3_leaf_module(block, True)


def are_modules_of_their_own(model: nn.Module) -> bool:
    """Whether each expert is a module that is called where a token was routed to it.

    So it is in transformers 4. Experts of stacked weights are one module, which every rank calls.
    """
    blocks: list[Any] = expert_blocks(model)
    return any(isinstance(m, nn.ModuleList) for block in blocks for m in block.experts.modules())


def router_loss_weight(model: Any) -> float:
    """Weight of the routers' loss in what `model` itself would return as its loss; 0 without one.

    transformers adds it where config.json says output_router_logits.
    """
    if not getattr(model.config, "output_router_logits", False) or not expert_blocks(model):
        return 0.0
    return float(getattr(model, "router_aux_loss_coef", 0.0))


def router_loss(
    model: Any, router_logits: tuple[torch.Tensor, ...], mask_BT: torch.Tensor | None = None
) -> torch.Tensor:
    """The load-balancing loss of the model's own module, of one micro-batch (arXiv 2101.03961).

    router_logits: of each layer [N, experts]. mask_BT: 0 where a token is padding and not counted;
    None: all are counted. At least 1 where tokens go evenly, times experts.
    """
    function = sys.modules[type(model).__module__].load_balancing_loss_func
    return function(router_logits, model.num_experts, model.num_experts_per_tok, mask_BT)
