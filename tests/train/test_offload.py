"""ZeRO-3 with its optimizer, its parameters or both on the host: the same run."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.ranks import run_ranks
from tests.train.checkpoint.test_universal import cut, odd_config, series, weights

RUN = "tests.train.runs:run"
SETTINGS = {
    "optimizer": {"offload_optimizer": {"device": "cpu", "pin_memory": True}},
    "parameters": {"offload_param": {"device": "cpu"}},
    "both": {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}},
}


def offloaded(config, what, **more):
    """The same run in another folder, with the offload named `what`."""
    zero = config.deepspeed["zero_optimization"] | SETTINGS[what]
    out_dir = f"{config.train.out_dir}-{what}"
    return config.model_copy(
        update={
            "deepspeed": config.deepspeed | {"zero_optimization": zero},
            "train": config.train.model_copy(update={"out_dir": out_dir, **more}),
        }
    )


@pytest.fixture(scope="module")
def in_place(tmp_path_factory):
    config = odd_config(
        tmp_path_factory.mktemp("run"), steps=6, micro_batch=2, ema=True, use_ema=True
    )
    run_ranks(2, RUN, config=config)
    return config


@pytest.mark.parametrize("what", SETTINGS)
@pytest.mark.parametrize("world", [1, 2])
def test_offloaded_it_trains_as_it_does_without(in_place, what, world):
    config = offloaded(in_place, what)
    config = config.model_copy(
        update={
            "train": config.train.model_copy(update={"out_dir": f"{config.train.out_dir}{world}"})
        }
    )
    assert run_ranks(world, RUN, config=config) == [6] * world
    np.testing.assert_allclose(series(config), series(in_place), rtol=0, atol=1e-5)
    for name, value in weights(config).items():
        torch.testing.assert_close(value, weights(in_place)[name], rtol=0, atol=1e-5)
    exported = AutoModelForCausalLM.from_pretrained(f"{config.train.out_dir}/model")
    assert torch.isfinite(exported(torch.arange(6)[None]).logits).all()


@pytest.mark.parametrize(
    "what", [w if w == "both" else pytest.param(w, marks=pytest.mark.long) for w in SETTINGS]
)
@pytest.mark.parametrize(("before", "after"), [(2, 2), (2, 1), (1, 2)])
def test_offloaded_it_is_resumed_at_any_number_of_ranks(in_place, what, before, after):
    config = offloaded(in_place, what)
    config = config.model_copy(
        update={
            "train": config.train.model_copy(
                update={"out_dir": f"{config.train.out_dir}-{before}-{after}"}
            )
        }
    )
    run_ranks(before, RUN, config=config)
    whole = series(config)
    cut(config, 3)
    assert run_ranks(after, RUN, config=config) == [6] * after
    if before == after:
        assert series(config) == whole
    np.testing.assert_allclose(series(config), series(in_place), rtol=0, atol=1e-5)
    for name, value in weights(config).items():
        torch.testing.assert_close(value, weights(in_place)[name], rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def nvme(tmp_path_factory):
    """The settings of parameters on a disk, where DeepSpeed's operator can be built (minutes)."""
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if not AsyncIOBuilder().is_compatible(verbose=False):
        pytest.skip("libaio's headers (libaio-dev) or a C++ compiler are not installed")
    AsyncIOBuilder().load(verbose=False)
    folder = str(tmp_path_factory.mktemp("nvme"))
    return {"device": "nvme", "nvme_path": folder, "buffer_count": 5, "buffer_size": 1_000_000}


@pytest.mark.long
@pytest.mark.parametrize("after", [1, 2])
def test_parameters_on_nvme_train_and_are_resumed_as_in_memory(in_place, nvme, after):
    train = in_place.train.model_copy(
        update={"ema": False, "use_ema": False, "out_dir": f"{in_place.train.out_dir}-ram{after}"}
    )
    plain = in_place.model_copy(update={"train": train})
    zero = plain.deepspeed["zero_optimization"] | {"offload_param": nvme}
    config = plain.model_copy(
        update={
            "deepspeed": plain.deepspeed | {"zero_optimization": zero},
            "train": train.model_copy(update={"out_dir": f"{train.out_dir}-nvme"}),
        }
    )
    for each in (plain, config):
        assert run_ranks(2, RUN, config=each) == [6, 6]
    assert series(config) == series(plain)
    cut(config, 3)
    assert run_ranks(after, RUN, config=config) == [6] * after
    np.testing.assert_allclose(series(config), series(plain), rtol=0, atol=1e-5)
    for name, value in weights(config).items():
        torch.testing.assert_close(value, weights(plain)[name], rtol=0, atol=1e-5)


def test_an_operator_that_cannot_be_built_is_one_line_before_a_model_is_loaded(
    tmp_path, monkeypatch
):
    from megadistill.errors import ConfigError
    from megadistill.train import hardware_checks

    monkeypatch.setattr(hardware_checks, "_has_async_io", lambda: False)
    zero = {"offload_param": {"device": "nvme", "nvme_path": str(tmp_path)}}
    with pytest.raises(ConfigError, match=r"offload_param\.device: nvme, .* \(libaio-dev\)"):
        hardware_checks.check_machine({"zero_optimization": zero})
