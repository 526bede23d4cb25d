"""A wheel of the files that git has, and an environment that it is installed in."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from tests.programs import ROOT
from tests.test_repository import tracked_files

PARTS = ("megadistill", "configs", "setup.py", "pyproject.toml", "README.md", "LICENSE")


def build_wheel(folder: Path) -> Path:
    """Build the wheel in `folder`, from a copy, since building writes beside the sources."""
    source = folder / "source"
    for file in tracked_files():
        if file.parts[0] in PARTS:
            (source / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / file, source / file)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--wheel-dir", str(folder), str(source)], check=True)
    (wheel,) = folder.glob("*.whl")
    return wheel


class Environment:
    """A new virtual environment, whose commands see nothing of the clone or of this process."""

    def __init__(self, folder: Path) -> None:
        self.bin, self.home = folder / "bin", folder / "home"
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        self.home.mkdir()
        self.constraint = folder / "torch.txt"
        lock = (ROOT / "requirements.lock").read_text().splitlines()
        pins = [line for line in lock if line.startswith(("torch==", "uv=="))]
        self.constraint.write_text("\n".join(pins) + "\n")

    def pip(self, *requirements: str) -> None:
        """Install as plain pip resolves, with torch as the lock pins it."""
        pip = [str(self.bin / "python"), "-m", "pip", "install", "--quiet"]
        subprocess.run([*pip, "--constraint", str(self.constraint), *requirements], check=True)

    def uv(self, *arguments: str) -> None:
        """Install as uv resolves, which takes overrides."""
        uv = [str(self.bin / "uv"), "pip", "install", "--quiet", "--python"]
        where = [str(self.bin / "python"), "--constraint", str(self.constraint)]
        environment = {"UV_SYSTEM_CERTS": "1", **os.environ}
        subprocess.run([*uv, *where, *arguments], check=True, env=environment)

    def run(self, *command: str, cwd: Path) -> str:
        """Returns what a command printed, which must end with code 0."""
        done = subprocess.run(
            command,
            cwd=cwd,
            env={"PATH": f"{self.bin}:/usr/bin:/bin", "HOME": str(self.home)},
            executable=str(self.bin / command[0]),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert done.returncode == 0, done.stdout
        assert "Traceback" not in done.stdout, done.stdout
        return done.stdout
