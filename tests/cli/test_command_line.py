"""The command line that the programs share."""

from __future__ import annotations

import argparse
import logging
import subprocess
import sys

import pytest

from megadistill.cli.command_line import amount, parse, run
from megadistill.errors import ConfigError, StoreError, TrainError

PROGRAM = """
import logging, sys
from megadistill.cli.command_line import parse, run
from megadistill.config import load_config

def main(argv):
    args = parse(argv, "Try.")
    config = load_config(args.config, args.overrides)
    logging.getLogger("megadistill.try").info("steps %d", config.train.steps)
    if args.dry_run:
        return 3

sys.exit(run(main))
"""


def program(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    import os

    return subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | environment,
    )


@pytest.mark.parametrize(
    "argv",
    [
        "--local_rank=1 --config c.yaml a.b=1 c.d=-2 --dry_run",
        "a.b=1 --local_rank=1 --dry_run c.d=-2 --config=c.yaml",
        "--config c.yaml a.b=1 --dry-run c.d=-2 --local_rank 1",
        "--dry_run a.b=1 c.d=-2 --config c.yaml --local-rank=1",
    ],
)
def test_arguments_are_taken_in_any_order_with_the_launchers_local_rank_anywhere(argv):
    args = parse(argv.split(), "Try.")
    assert (args.config, args.overrides, args.dry_run) == ("c.yaml", ["a.b=1", "c.d=-2"], True)


def test_a_tool_has_arguments_of_its_own():
    args = parse(
        ["runs/cache", "--json", "--local_rank=0"],
        "Inspect.",
        takes_overrides=False,
        extra=lambda parser: (
            parser.add_argument("cache", nargs="?"),
            parser.add_argument("--json", action="store_true"),
        ),
    )
    assert (args.cache, args.json, args.config) == ("runs/cache", True, None)


def test_an_unknown_argument_leaves_with_code_2_and_no_traceback():
    done = program("--confg", "x.yaml")
    assert done.returncode == 2
    assert "unrecognized arguments: --confg" in done.stderr
    assert "Traceback" not in done.stderr


def test_mistakes_are_lines_on_stderr_and_exit_code_2():
    done = program("--config", "demo.yaml", "train.lrr=1", "targets.tua=2")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines() == [
        "error: command line: targets.tua: unknown key, did you mean targets.tau?",
        "error: command line: train.lrr: unknown key, did you mean train.lr?",
    ]


def test_one_rank_of_a_host_reports_a_mistake_in_the_configuration():
    quiet = program("train.lrr=1", RANK="1", LOCAL_RANK="1", WORLD_SIZE="4")
    assert (quiet.returncode, quiet.stderr) == (2, "")
    other_host = program("train.lrr=1", RANK="2", LOCAL_RANK="0", WORLD_SIZE="4")
    assert " rank 2] command line: train.lrr: unknown key" in other_host.stderr


def test_rank_0_logs_progress_with_host_and_rank_and_the_others_do_not():
    first = program("--config", "demo.yaml", "--dry_run", "train.steps=77", RANK="0")
    assert first.returncode == 3
    assert first.stderr.rstrip().endswith("rank 0] steps 77")
    assert program("--config", "demo.yaml", RANK="1").stderr == ""


@pytest.fixture
def logging_as_before():
    package = logging.getLogger("megadistill")
    handlers, level = list(package.handlers), package.level
    yield
    package.handlers[:] = handlers
    package.setLevel(level)


def test_an_error_that_may_be_one_ranks_own_is_printed_by_that_rank(
    capsys, monkeypatch, logging_as_before
):
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("LOCAL_RANK", "1")

    def fail(argv):
        raise StoreError("x: no space left")

    assert run(fail, []) == 2
    assert capsys.readouterr().err.endswith(" rank 3] x: no space left\n")


def test_an_error_that_every_rank_was_told_of_is_printed_by_rank_0(
    capsys, monkeypatch, logging_as_before
):
    error = StoreError("x: no space left")
    error.common = True

    def fail(argv):
        raise error

    for rank, said in (("0", "error: x: no space left\n"), ("3", "")):
        monkeypatch.setenv("RANK", rank)
        assert run(fail, []) == 2
        assert capsys.readouterr().err == said


@pytest.mark.parametrize(
    ("error", "code"), [(ConfigError("a\nb"), 2), (TrainError("t"), 2), (KeyboardInterrupt(), 130)]
)
def test_exit_codes(error, code, capsys, logging_as_before):
    def fail(argv):
        raise error

    assert run(fail, []) == code
    assert "Traceback" not in capsys.readouterr().err


def test_an_error_of_the_programs_own_keeps_its_traceback(logging_as_before):
    def fail(argv):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run(fail, [])


def test_a_reader_that_has_read_enough_is_no_error():
    code = (
        "import sys; from megadistill.cli.command_line import run\n"
        "def main(argv):\n    for line in range(100_000):\n        print('a line', line)\n"
        "sys.exit(run(main))"
    )
    writer = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    writer.stdout.readline()
    writer.stdout.close()
    assert writer.stderr.read() == b""
    writer.stderr.close()
    assert writer.wait() == 141


@pytest.mark.parametrize("text", ["-1", "-0.5", "inf", "nan", "much"])
def test_an_amount_is_a_number_that_is_not_negative(text):
    with pytest.raises(argparse.ArgumentTypeError, match="expected a number, 0 or more"):
        amount(text)
    assert (amount("0"), amount("2.5")) == (0.0, 2.5)
