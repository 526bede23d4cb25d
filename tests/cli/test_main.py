"""The command `megadistill`: the module that it runs, and its answer where it runs none."""

from __future__ import annotations

import pkgutil
import subprocess
import sys

import pytest

import megadistill.cli
from megadistill import __version__
from megadistill.__main__ import COMMANDS, SCRIPTS, dispatch
from megadistill.errors import ConfigError
from tests.programs import ROOT

SHARED = {"answer", "command_line", "stores", "unknown_options"}
HEAVY = "{'torch', 'streaming', 'transformers', 'datasets', 'deepspeed', 'matplotlib'}"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """`python -m megadistill`, which ends with 97 if it imported one of HEAVY."""
    code = (
        "import runpy, sys\n"
        "try: runpy.run_module('megadistill', run_name='__main__', alter_sys=True)\n"
        f"finally: assert not {HEAVY} & set(sys.modules), sys.exit(97)"
    )
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True
    )


def test_every_command_is_a_module_of_its_own() -> None:
    modules = {module.name for module in pkgutil.iter_modules(megadistill.cli.__path__)}
    assert modules - SHARED == set(COMMANDS)


def test_help_lists_every_command_and_imports_no_torch() -> None:
    done = run("--help")
    assert done.returncode == 0, done.stderr
    for name, text in COMMANDS.items():
        assert f"  {name} " in done.stdout
        assert text in done.stdout
    assert run("--version").stdout == f"megadistill {__version__}\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_describes_itself_under_its_own_name_without_torch(command: str) -> None:
    done = run(command, "--help")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"usage: megadistill {command} ")
    assert f"megadistill {command} " in done.stdout.partition("\n\n")[2]


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("genrate", "generate"),
        ("inspect_cache", "inspect"),
        ("tools/make_tokens.py", "tokens"),
        ("launch/train.py", "train"),
    ],
)
def test_a_mistyped_command_is_one_line_with_a_suggestion_and_imports_no_torch(
    typed: str, meant: str
) -> None:
    done = run("--local_rank=0", typed, "--config", "x.yaml")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        f"error: command line: {typed}: unknown command, did you mean {meant}?\n"
    )


def test_a_command_like_none_lists_them_all() -> None:
    with pytest.raises(
        ConfigError, match=r"xyz: unknown command, expected one of generate, .*config"
    ):
        dispatch(["xyz"])


def test_without_a_command_the_list_is_printed_with_code_2() -> None:
    done = run()
    assert (done.returncode, done.stdout) == (2, "")
    assert "retruncate" in done.stderr


@pytest.mark.parametrize("before", [["--local_rank=1"], ["--local_rank", "1"], ["--local-rank=1"]])
def test_a_launchers_local_rank_is_taken_before_and_behind_the_command(capsys, before) -> None:
    assert dispatch([*before, "config", "--config", "demo.yaml", "train.steps=77", *before]) == 0
    assert "  steps: 77\n" in capsys.readouterr().out


def test_the_other_names_of_programs_are_programs() -> None:
    assert all((ROOT / "tools" / f"{script}.py").is_file() for script in SCRIPTS)


def test_options_that_are_keys_are_answered_with_the_override() -> None:
    for arguments, said in (
        (["--lr", "1e-4"], "--lr: a key takes no dashes: set it as train.lr=1e-4"),
        (["--train.lr=1e-4"], "--train.lr: a key takes no dashes: set it as train.lr=1e-4"),
        (["--train.lrr", "2"], "--train.lrr: a key takes no dashes: set it as train.lr=2"),
        (["--keep-best"], "--keep-best: a key takes no dashes: set it as train.keep_best=true"),
        (
            ["--deepspeed.log_level", "info"],
            "--deepspeed.log_level: a key takes no dashes: set it as deepspeed.log_level=info",
        ),
        (
            ["--per-device-train-batch-size", "4"],
            "--per-device-train-batch-size: the key is train.micro_batch: "
            "set it as train.micro_batch=VALUE",
        ),
        (["--no_vaildate"], "--no_vaildate, did you mean --no_validate?"),
        (["--confg", "x"], "--confg, did you mean --config?"),
        (["--qqq"], "--qqq: --help lists the options"),
    ):
        with pytest.raises(ConfigError) as refused:
            dispatch(["generate", *arguments])
        assert str(refused.value) == f"command line: unrecognized arguments: {said}"


def test_a_command_without_keys_suggests_options_alone() -> None:
    with pytest.raises(ConfigError, match=r"unrecognized arguments: --lr: --help lists"):
        dispatch(["copy", "a", "b", "--lr", "3"])
    with pytest.raises(ConfigError, match=r"--verfy, did you mean --verify\?"):
        dispatch(["copy", "a", "b", "--verfy"])
