"""metrics.jsonl and eval.jsonl, as runs leave them that were killed, resumed or damaged."""

import json

import pytest

from megadistill.errors import TrainError
from megadistill.train.reporting.jsonl_log import JsonlLog, read_records


def lines(*steps):
    return "".join(json.dumps({"step": step, "loss": 1.0 / step}) + "\n" for step in steps)


def test_what_is_written_is_read(tmp_path):
    journal = JsonlLog(tmp_path / "metrics.jsonl", done=0)
    journal.write({"step": 1, "loss": 0.1, "note": "a\u2028b"})
    assert read_records(tmp_path / "metrics.jsonl") == [
        {"step": 1, "loss": 0.1, "note": "a\u2028b"}
    ]
    journal.close()
    assert journal.reached == 0


@pytest.mark.parametrize("half", ["", '{"step": 4, "lo', '{"step": 4}', "\ufffd"])
def test_half_a_line_at_the_end_is_left_out(tmp_path, half):
    file = tmp_path / "metrics.jsonl"
    file.write_text(lines(1, 2, 3) + half)
    assert [record["step"] for record in read_records(file)] == [1, 2, 3]


def test_a_character_cut_in_two_by_a_kill_is_half_a_line_too(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(lines(1).encode() + '{"step": 2, "note": "\u00e9'.encode()[:-1])
    assert [record["step"] for record in read_records(file)] == [1]


def test_a_resumed_run_drops_what_it_does_again_and_knows_how_far_it_had_been(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text(lines(1, 2, 3, 4, 5) + '{"st')
    journal = JsonlLog(file, done=3)
    journal.write({"step": 4})
    journal.close()
    assert [record["step"] for record in read_records(file)] == [1, 2, 3, 4]
    assert journal.reached == 5


@pytest.mark.parametrize("line", ['{"step": 2, "lo', "{}", "[2]", "", '{"step": "2"}', "\0\0\0\0"])
def test_a_damaged_line_in_the_middle_is_named(tmp_path, line):
    file = tmp_path / "metrics.jsonl"
    file.write_text(lines(1) + line + "\n" + lines(3))
    for read in (read_records, lambda path: JsonlLog(path, done=9)):
        with pytest.raises(TrainError, match=r"metrics\.jsonl: line 2 is no record of a step"):
            read(file)
    assert file.read_text() == lines(1) + line + "\n" + lines(3)  # left as it was


def test_a_journal_that_is_not_there_is_empty_and_one_that_cannot_be_read_is_an_error(tmp_path):
    assert read_records(tmp_path / "eval.jsonl") == []
    with pytest.raises(TrainError, match="cannot be read: Is a directory"):
        read_records(tmp_path)
