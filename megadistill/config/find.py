"""Which file a configuration's name stands for."""

from __future__ import annotations

from pathlib import Path

from megadistill.config.suggest import closest
from megadistill.errors import ConfigError

DEFAULT = "zero3.yaml"
_PACKAGE = Path(__file__).resolve().parent.parent
# setup.py installs configs/ inside the package; in a clone the folder lies beside it.
_INSTALLED, _CLONED = _PACKAGE / "configs", _PACKAGE.parent / "configs"


def find_config(name: str) -> Path:
    """The file that `name` stands for; ConfigError that says where it was looked for."""
    given = Path(name).expanduser()
    names = [given] if given.suffix in (".yaml", ".yml") else [given, Path(f"{given}.yaml")]
    places = [Path()]
    if len(given.parts) == 1:
        places += [Path("configs"), *_shipped()]
    elif not given.is_absolute():
        # configs/demo.yaml, from whatever folder the program was started in
        places += [folder.parent for folder in _shipped()]
    tried = []
    for place in places:
        for each in names:
            if (place / each).is_file():
                return place / each
        tried.append(place / names[-1])
    there = sorted(
        {f.name for p in [Path(), Path("configs"), *_shipped()] for f in p.glob("*.y*ml")}
    )
    missing = f"{name}: no such configuration; looked for {_listed(tried)}"
    if not _shipped():
        raise ConfigError(
            f"{missing}; this installation of megadistill lacks its configurations, expected in "
            f"{_INSTALLED}: install it again"
        )
    near = closest(given.stem, {Path(file).stem: file for file in there})
    raise ConfigError(
        missing
        + (f"; did you mean {near}.yaml?" if near else f"; there is {', '.join(there) or 'none'}")
    )


def _shipped() -> list[Path]:
    """The folders of the configurations that come with megadistill: a clone's, an install's."""
    return [folder for folder in (_INSTALLED, _CLONED) if (folder / DEFAULT).is_file()]


def _listed(paths: list[Path]) -> str:
    return ", ".join(dict.fromkeys(shown(path) for path in paths))


def shown(path: Path) -> str:
    """`path` as a message names it: from the current folder where it lies below it."""
    try:
        return str(path.resolve().relative_to(Path.cwd()))
    except ValueError:
        return str(path)
