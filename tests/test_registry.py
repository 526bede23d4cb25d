"""Registries: objects of other distributions are found by name, and what is wrong is one line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from megadistill.errors import ConfigError
from megadistill.registry import Registry
from tests.outside import installed, make_distribution

MODULE = "class Colour(str):\n    pass\nRED = 'red'\nBLUE = 5\n"


def colours(**own: str) -> Registry[str]:
    return Registry("colour", {"green": "green", **own}, base=str)


def refused(registry: Registry, name: str, *, key: str = "") -> str:
    with pytest.raises(ConfigError) as error:
        registry.get(name, key=key)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture
def paint(tmp_path) -> Path:
    entry_points = {
        "colour.red": "paint_shop:RED",
        "colour.blue": "paint_shop:BLUE",
        "colour.lost": "paint_shop:LOST",
        "colour.gone": "no_such_module:RED",
        "shape.round": "paint_shop:RED",
    }
    return make_distribution(
        tmp_path / "paint", "paint-shop", entry_points, version="2.5", module=MODULE
    )


def test_an_installed_object_is_found_by_name_and_imported_at_first_use(paint):
    with installed(paint):
        registry = colours()
        assert registry.names() == ("green", "blue", "gone", "lost", "red")
        assert "red" in registry
        assert "round" not in registry
        assert "paint_shop" not in sys.modules
        assert registry.get("red") == "red"
        assert "paint_shop" in sys.modules


def test_the_distribution_of_an_object_is_known_and_megadistills_own_have_none(paint):
    with installed(paint):
        found = colours().distribution("red")
        assert (found.name, found.version) == ("paint-shop", "2.5")
        assert colours().distribution("green") is None
        assert colours().distribution("missing") is None


def test_an_unknown_name_lists_the_names_there_are():
    found = refused(colours(), "gren", key="paint.colour")
    assert found == "paint.colour: 'gren' is no colour that is installed, expected one of green"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("gone", "cannot be imported from no_such_module:RED: ModuleNotFoundError"),
        ("lost", "cannot be imported from paint_shop:LOST: AttributeError"),
        ("blue", "paint_shop:BLUE of paint-shop 2.5 is a int, expected a builtins.str"),
    ],
)
def test_an_entry_point_that_gives_nothing_usable_is_refused_in_one_line(paint, name, said):
    with installed(paint):
        found = refused(colours(), name, key="paint.colour")
    assert found.startswith("paint.colour: ")
    assert said in found
    assert "paint-shop 2.5" in found


def test_a_name_of_megadistills_own_cannot_be_taken(tmp_path):
    folder = make_distribution(tmp_path, "thief", {"colour.green": "thief:RED"}, module=MODULE)
    with installed(folder):
        found = refused(colours(), "green")
    assert "takes the name of megadistill's own colour green" in found
    assert "thief 1.0" in found


def test_two_distributions_cannot_register_one_name(tmp_path, paint):
    other = make_distribution(tmp_path / "b", "other", {"colour.red": "other:RED"}, module=MODULE)
    with installed(paint, other):
        found = refused(colours(), "red")
    assert "paint-shop 2.5" in found
    assert "other 1.0" in found


def test_names_are_known_in_a_fresh_process_from_the_metadata_alone(paint):
    script = (
        "import sys; from megadistill.registry import Registry;"
        "print(*Registry('colour', {}, base=str).names(), 'paint_shop' in sys.modules)"
    )
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=True,
        cwd=root,
        env={"PYTHONPATH": f"{root}:{paint}", "PATH": "/usr/bin:/bin"},
    )
    assert done.stdout.split() == ["blue", "gone", "lost", "red", "False"]
