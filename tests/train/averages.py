"""Moving averages on warm ranks: every shape of parameter, and what an error leaves."""

from pathlib import Path

import torch

from megadistill import parallel  # noqa: F401 - before deepspeed
from megadistill.train.run import build, prepare


class AllShapes(torch.nn.Module):
    # A scalar of no dimension is more than DeepSpeed 0.19.8 can broadcast when it begins.
    SHAPES = {  # noqa: RUF012
        "scalar": (1,),
        "three": (3,),
        "odd": (3, 5),
        "deep": (2, 3, 7),
        "big": (17, 11),
    }

    def __init__(self, dtype):
        super().__init__()
        for name, shape in self.SHAPES.items():
            self.register_parameter(name, torch.nn.Parameter(torch.zeros(shape, dtype=dtype)))

    def forward(self, factor):
        return factor * sum((p.float() ** 2).sum() for p in self.parameters())


def averages(mesh, folder, dtype, written_by):
    """Averages of parameters of all shapes, whole: made in three steps here, or loaded.

    Made here, they come with the weights of each step, the first those before any.
    """
    import deepspeed

    from megadistill.train.ema import Ema

    config = {
        "train_batch_size": mesh.world,
        "zero_optimization": {"stage": 3, "sub_group_size": 20},
        "bf16": {"enabled": dtype == "bfloat16"},
    }
    with deepspeed.zero.Init(config_dict_or_path=config):
        model = AllShapes(getattr(torch, dtype))
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0), torch.no_grad():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=torch.optim.AdamW(model.parameters(), lr=0.1), config=config
    )
    ema = Ema(engine, decay=0.3)
    if written_by is not None:
        ema.load(Path(folder), rank=mesh.rank, written_by=written_by)
    weights = [masters(model)]
    for step in range(0 if written_by else 3):
        engine.backward(engine(1.0 + step))
        engine.step()
        ema.update()
        weights.append(masters(model))
    if not written_by:
        ema.save(Path(folder), rank=mesh.rank)
    mesh.barrier()
    assert ema.updates == 3
    with ema.in_place(), deepspeed.zero.GatheredParameters(list(model.parameters())):
        found = {name: p.detach().float().numpy().copy() for name, p in model.named_parameters()}
    return found, weights


def masters(model):
    """The whole fp32 weights."""
    from deepspeed.utils import safe_get_full_fp32_param

    return {n: safe_get_full_fp32_param(p).numpy().copy() for n, p in model.named_parameters()}


def error_with_the_average(mesh, config):
    """How often this rank deals weights anew (collective) after `evaluation_weights` fails."""
    trainer = build(prepare(config, mesh), mesh)
    optimizer, dealt = trainer.engine.optimizer, []
    deal = optimizer.checkpoint_event_epilogue
    optimizer.checkpoint_event_epilogue = lambda: (dealt.append(1), deal())
    try:
        with trainer.evaluation_weights():
            dealt.clear()
            raise SystemExit(143)
    except SystemExit:
        return len(dealt)
