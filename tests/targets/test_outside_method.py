"""A method of another distribution: found by its name, and taken from selecting to training."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from megadistill import decode_targets, encode_targets, select_targets
from megadistill.blocks import open_store
from megadistill.cache.reader import open_cache
from megadistill.cache.recorded_settings import check_targets
from megadistill.cache.retruncate import retruncate_cache
from megadistill.config import Config, load_config
from megadistill.errors import ConfigError, CorruptBlockError, StoreError
from megadistill.inspect.inspection import inspect_store
from megadistill.targets import SparseMethod, find_method, sparse_method
from megadistill.targets.method import method_with_byte
from tests.cache.targets import METHODS as OWN
from tests.models.made import tiny_model
from tests.outside import installed, make_distribution
from tests.ranks import run_ranks

SOURCE = (Path(__file__).parent / "tiny_method.py").read_text()
NAME = "at_least"
SEQ_LEN, BLOCK = 32, 8


def tiny(folder: Path, *, name: str = "tiny-method", method: str = NAME, byte: str = "200") -> Path:
    """A distribution that registers the method, under these names and with this byte."""
    module = name.replace("-", "_")
    return make_distribution(
        folder,
        name,
        {f"method.{method}": f"{module}:AT_LEAST"},
        module=SOURCE.replace('"at_least", 200', f'"{method}", {byte}'),
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tiny(tmp_path_factory.mktemp("installed"))


@pytest.fixture
def here(folder):
    with installed(folder):
        yield


def log_probs() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.log_softmax(3 * torch.randn(50, 300, generator=generator), 1)


def selected(**options):
    keys_N2 = torch.stack([torch.zeros(50).long(), torch.arange(50)], 1)
    return select_targets(log_probs(), method=NAME, keys_N=keys_N2, options=options)


# The object ---------------------------------------------------------------------------------------


def test_our_own_methods_keep_the_bytes_they_were_written_with():
    assert [sparse_method(name).byte for name in OWN] == [0, 1, 2, 3]
    assert [method_with_byte(byte).name for byte in range(4)] == list(OWN)
    assert method_with_byte(4) is None


@pytest.mark.usefixtures("here")
def test_an_outside_method_selects_encodes_and_decodes():
    targets = selected(least=0.1)
    probs_NV = log_probs().exp()
    expected = [{i for i, p in enumerate(row) if p >= 0.1 or p == row.max()} for row in probs_NV]
    found = targets.numpy()
    rows = np.split(found.ids, found.offsets[1:-1])
    assert [set(row.tolist()) for row in rows] == expected
    data = encode_targets(targets, vocab_size=300)
    assert data[1] == 200
    again = decode_targets(data, vocab_size=300)
    assert again.method == NAME
    np.testing.assert_array_equal(again.ids, found.ids)
    np.testing.assert_allclose(again.weights, found.weights, atol=1e-3)
    np.testing.assert_allclose(again.tail, found.tail, atol=1e-3)


@pytest.mark.usefixtures("here")
def test_parameters_that_are_missing_unknown_or_out_of_bounds_are_refused():
    for options, said in (
        ({}, "at_least needs least: set least"),
        ({"leest": 1}, "at_least has no option 'leest', did you mean least?"),
        ({"least": 2}, "least is 2, expected above 0 and at most 1"),
    ):
        with pytest.raises(ValueError, match="least") as error:
            selected(**options)
        assert str(error.value) == said


def test_what_was_encoded_by_a_method_that_is_gone_is_refused(folder):
    with installed(folder):
        data = encode_targets(selected(least=0.1), vocab_size=300)
    with pytest.raises(CorruptBlockError):
        decode_targets(data, vocab_size=300)


# The registration ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("byte", "said"),
    [
        ("100", "has the byte 100, expected 128 to 255: those below are megadistill's own"),
        ("256", "has the byte 256, expected 128 to 255"),
        ("'x'", "has the byte 'x', expected 128 to 255"),
    ],
)
def test_a_byte_that_is_not_for_outside_methods_is_refused(tmp_path, byte, said):
    wrong = tiny(tmp_path, byte=byte)
    with installed(wrong), pytest.raises(ConfigError) as error:
        find_method(NAME, "targets.method")
    assert str(error.value).startswith("targets.method: the method at_least of tiny-method 1.0 ")
    assert said in str(error.value)


def test_a_byte_that_another_distribution_has_is_refused_naming_both(tmp_path, folder):
    other = tiny(tmp_path / "b", name="second-method", method="second")
    with installed(folder, other), pytest.raises(ConfigError) as error:
        find_method("second")
    assert str(error.value) == (
        "the method second of second-method 1.0 has the byte 200, which is also that of at_least "
        "of tiny-method 1.0: uninstall one of them"
    )


def test_a_method_that_cannot_be_imported_spares_the_others(tmp_path, folder):
    broken = make_distribution(tmp_path, "broken", {"method.broken": "no_such_module:X"})
    with installed(folder, broken):
        assert isinstance(find_method(NAME), SparseMethod)
        with pytest.raises(ConfigError, match=r"cannot be imported from no_such_module:X: Module"):
            find_method("broken")


# The configuration --------------------------------------------------------------------------------


def mistakes(*overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as error:
        load_config("demo.yaml", list(overrides))
    return str(error.value).splitlines()


@pytest.mark.usefixtures("here")
def test_the_configuration_takes_any_registered_name_with_its_options():
    options = [f"targets.method={NAME}", "targets.options={least: 0.2}"]
    config = load_config("demo.yaml", options)
    assert find_method(NAME).read(config.targets) == {"least": 0.2, "most": 8}
    (line,) = mistakes(f"targets.method={NAME}", "targets.options={least: 3}")
    assert line.endswith("targets.options: least is 3, expected above 0 and at most 1")
    (line,) = mistakes("targets.method=at_leest")
    assert "expected one of varopt, multinomial, topk, topp, union, exact, projected, at_l" in line
    assert line.endswith("found 'at_leest', did you mean at_least?")


def test_a_name_that_nobody_registers_gets_a_suggestion():
    (line,) = mistakes("targets.method=topkk")
    assert "found 'topkk', did you mean topk?" in line


def test_options_are_not_for_our_own_methods():
    (line,) = mistakes("targets.options={tau: 0.1}")
    assert "targets.options: varopt has no options, found tau; it takes targets.tau" in line


def test_an_entry_point_that_cannot_be_imported_is_a_mistake_of_its_key(tmp_path):
    broken = make_distribution(tmp_path, "broken", {"method.broken": "no_such_module:X"})
    with installed(broken):
        (line,) = mistakes("targets.method=broken")
    assert "targets.method: the method broken of broken 1.0 cannot be imported from" in line


# The cache ----------------------------------------------------------------------------------------


def settings(place: Path, cache: Path) -> dict:
    return {
        "data": {
            "files": [str(place / "text.jsonl")],
            "dir": str(place / "tokens"),
            "seq_len": SEQ_LEN,
            "block_size": BLOCK,
            "workers": 1,
        },
        "teacher": {"model": str(place / "teacher"), "dtype": "float32", "micro_batch": 4},
        "targets": {"method": NAME, "options": {"least": 0.02}},
        "cache": {"dir": str(cache)},
    }


def generate(mesh, keys: dict, folder: str) -> None:
    from megadistill.cache.build import build_cache

    with installed(Path(folder)):
        build_cache(Config.model_validate(keys), mesh)


@pytest.fixture(scope="module")
def cache(folder, tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("place")
    tiny_model(place / "teacher")
    words = [f"word{i % 7} and more of it {i}" for i in range(120)]
    (place / "text.jsonl").write_text("\n".join(json.dumps({"text": w}) for w in words))
    keys = settings(place, place / "cache")
    run_ranks(1, f"{__name__}:generate", keys=keys, folder=str(folder))
    return place / "cache"


@pytest.mark.usefixtures("here")
def test_a_cache_is_generated_and_names_the_distribution(cache):
    found = open_cache(cache)
    assert found.complete()
    assert found.verify() == []
    assert found.recipe["method"] == NAME
    assert found.recipe["options"] == {"least": 0.02, "most": 8}
    assert found.recipe["method_distribution"] == "tiny-method"
    assert found.store.marker(0)["made_with"]["tiny-method"] == "1.0"
    facts = inspect_store(str(cache))
    assert (facts["complete"], facts["method"]) == (True, NAME)
    assert facts["parameters"]["options"] == {"least": 0.02, "most": 8}
    assert 0 < facts["listed_mass"]["mean"] < 1


@pytest.mark.usefixtures("here")
def test_such_a_cache_is_retruncated(cache, tmp_path):
    small = retruncate_cache(cache, tmp_path / "small", options={"least": 0.05})
    assert small.recipe["options"] == {"least": 0.05, "most": 8}
    assert small.recipe["retruncated_from"]["options"] == {"least": 0.02}
    found, before = open_cache(tmp_path / "small"), open_cache(cache)
    assert found.verify() == []
    entries = [sum(len(s["targets"].ids) for s in each) for each in (found, before)]
    assert 0 < entries[0] < entries[1]
    with pytest.raises(ConfigError, match=r"least: is 0.02 in .*, found 0.01"):
        retruncate_cache(cache, tmp_path / "larger", options={"least": 0.01})


def test_a_cache_whose_method_is_not_installed_is_refused_naming_it(cache, tmp_path):
    recipe = open_store(cache).recipe
    with pytest.raises(StoreError) as error:
        open_cache(cache)
    assert str(error.value).endswith(
        "cache.json: the method at_least of the distribution tiny-method is not installed: "
        "install tiny-method in this environment"
    )
    other = tiny(tmp_path, name="another-method")
    with installed(other), pytest.raises(StoreError) as error:
        open_cache(cache)
    assert "another-method registers another method of this name: install tiny-method" in str(
        error.value
    )
    with pytest.raises(ConfigError, match=r"^cache\.dir: .*: the method at_least of the dist"):
        check_targets(load_config("demo.yaml"), recipe, name=str(cache), key="cache.dir")
    with pytest.raises(StoreError, match="the method at_least of the distribution tiny-method"):
        inspect_store(str(cache))
