"""Positions of two tokenizers that have read the same text, against a search through all pairs."""

from __future__ import annotations

from itertools import chain
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, processors
from transformers import PreTrainedTokenizerFast

from megadistill.data.alignment import MULTIPLE, Alignment
from megadistill.errors import ConfigError
from tests.data.alignments import (
    END,
    PAIRS,
    TURN,
    align,
    by_search,
    byte_level,
    cut_row,
    encoded,
    fast,
    metaspace,
    plain_ids,
    text,
    unigram,
)


@pytest.mark.parametrize("pair", PAIRS)
def test_every_position_that_can_be_aligned_is_and_no_other(pair: str) -> None:
    student, teacher = PAIRS[pair]()
    found = positions = 0
    for seed in range(60):
        pieces = cut_row(student, seed)
        aligned = align(student, teacher, pieces)
        assert aligned.rows_N.tolist() == by_search(student, teacher, pieces, aligned), seed
        found, positions = found + (aligned.rows_N >= 0).sum(), positions + aligned.rows_N.size
    assert found > 0.4 * positions


@pytest.mark.parametrize("begin", [False, True])
@pytest.mark.parametrize("kind", [byte_level, metaspace])
def test_the_same_tokenizer_reads_the_same_and_every_position_is_its_own(
    kind: Any, begin: bool
) -> None:
    own = kind(begin=begin)
    pieces = [encoded(own, f"the {text(seed)}") for seed in range(5)]
    aligned = align(own, own, pieces)
    T = sum(map(len, pieces))
    assert aligned.tokens_BU[0, :T].tolist() == list(chain(*pieces))
    assert aligned.rows_N.tolist() == list(range(T))
    assert aligned.documents[0].tolist() == np.cumsum([0, *map(len, pieces)]).tolist()


def test_aligned_positions_decode_to_the_same_text() -> None:
    student, teacher = byte_level(400), byte_level(700)
    ids = encoded(student, text(1, count=40))[:-1]
    aligned = align(student, teacher, [ids])
    theirs = aligned.tokens_BU[0].tolist()
    pairs = [(i, row) for i, row in enumerate(aligned.rows_N.tolist()) if row >= 0]
    assert len(pairs) > len(ids) / 2
    for i, row in pairs:
        assert student.decode(ids[: i + 1]) == teacher.decode(theirs[: row + 1])


def test_a_character_cut_by_a_pieces_ends_costs_no_other_position() -> None:
    student, teacher = metaspace(scheme="never"), byte_level(700)
    ids = plain_ids(student, "\U0001f600the fox\u00df")
    assert student.convert_ids_to_tokens(ids[:4]) == ["<0xF0>", "<0x9F>", "<0x98>", "<0x80>"]
    whole = align(student, teacher, [ids]).rows_N
    assert (whole[[3, len(ids) - 3, len(ids) - 1]] >= 0).all()
    cut = align(student, teacher, [ids[2:-1]])
    assert teacher.decode(cut.tokens_BU[0][: cut.documents[0][1]]) == "the fox"
    assert cut.rows_N[:2].tolist() == [-1, -1]
    assert cut.rows_N[-1] == -1
    assert cut.rows_N[-2] == cut.documents[0][1] - 1
    nothing = align(student, teacher, [ids[1:3]])
    assert nothing.rows_N.tolist() == [-1, -1]
    assert nothing.documents[0].tolist() == [0]


def test_rows_of_different_length_are_filled_to_a_multiple_behind_a_start() -> None:
    student, teacher = byte_level(700), byte_level(260)
    rows = [
        [encoded(student, "the quick brown fox"), encoded(student, "\u4f60\u597d" * 12 + "x" * 40)],
        [encoded(student, "12345"), encoded(student, "it rains"), encoded(student, "abc " * 15)],
    ]
    T = min(sum(map(len, row)) for row in rows)
    rows = [[*row[:-1], row[-1][: T - sum(map(len, row[:-1]))]] for row in rows]
    aligned = align(student, teacher, *rows)
    U = aligned.tokens_BU.shape[1]
    assert U % MULTIPLE == 0
    assert aligned.tokens_BU.shape[0] == 2
    ends = []
    for row, pieces in enumerate(rows):
        *starts, end = aligned.documents[row].tolist()
        assert len(starts) == len(pieces)
        ends.append(end)
        assert (aligned.tokens_BU[row, end:] == teacher.eos_token_id).all()
        for ids, part in zip(
            pieces, np.split(aligned.tokens_BU[row, :end], starts[1:]), strict=True
        ):
            assert student.decode(ids) == teacher.decode(part)
    assert ends[0] != ends[1]
    assert U - max(ends) < MULTIPLE
    # The last position of each row is at its end, before the filler.
    assert aligned.rows_N.reshape(2, T)[:, -1].tolist() == [ends[0] - 1, U + ends[1] - 1]


def test_the_teacher_reads_no_padding_of_the_students() -> None:
    student, teacher = byte_level(700), byte_level(260)
    short, long = encoded(student, "it rains"), encoded(student, "the quick brown fox jumps " * 3)
    padding = len(long) - len(short)
    end = student.eos_token_id
    tokens_BT = np.array([[*short, *[end] * padding], long])
    documents = [np.array([0, len(short)]), np.array([0])]
    found = Alignment(student, teacher).align(tokens_BT, documents, np.array([padding, 0]))
    alone = align(student, teacher, [short])
    rows_BT = found.rows_N.reshape(tokens_BT.shape)
    assert rows_BT[0].tolist() == [*alone.rows_N.tolist(), *[-1] * padding]
    read = int(alone.documents[0][1])
    assert found.tokens_BU[0, :read].tolist() == alone.tokens_BU[0, :read].tolist()
    assert found.documents[0].tolist() == [0, read]
    assert (rows_BT[1] >= 0).any()


def test_a_teacher_of_just_a_multiple_has_no_filler() -> None:
    own = byte_level()
    ids = [own.eos_token_id] * MULTIPLE
    aligned = align(own, own, [ids])
    assert aligned.tokens_BU.tolist() == [ids]
    assert aligned.documents[0].tolist() == [0]


def test_begin_tokens_are_aligned_with_begin_tokens_where_the_student_has_them() -> None:
    student, teacher, without = (
        byte_level(400, begin=True),
        byte_level(500, begin=True),
        byte_level(),
    )
    rest, document = encoded(student, "the lazy fox")[2:], encoded(student, "the dogs")
    aligned = align(student, teacher, [rest, document])
    begins = np.flatnonzero(aligned.tokens_BU[0] == teacher.bos_token_id)
    assert begins.tolist() == aligned.documents[0][1:2].tolist()
    assert aligned.rows_N[len(rest)] == begins[0]
    # A teacher without a begin token has nothing that has read as little.
    assert align(student, without, [rest, document]).rows_N[len(rest)] == -1
    # A student without one does not say where a document begins.
    ids = encoded(without, "the lazy fox")
    aligned = align(without, teacher, [ids[1:], ids])
    begins = np.flatnonzero(aligned.tokens_BU[0] == teacher.bos_token_id)
    assert begins.tolist() == aligned.documents[0][:2].tolist()
    assert (aligned.rows_N >= 0).any()
    assert not np.isin(aligned.rows_N, begins).any()


def test_documents_in_one_piece_stay_apart_by_end_tokens() -> None:
    student, teacher = byte_level(400), byte_level(700)
    ids = encoded(student, "the fox") + encoded(student, "jumps over")
    aligned = align(student, teacher, [ids])
    theirs = encoded(teacher, "the fox") + encoded(teacher, "jumps over")
    assert aligned.tokens_BU[0, : len(theirs)].tolist() == theirs
    ends = np.flatnonzero(np.array(ids) == student.eos_token_id)
    assert aligned.rows_N[ends].tolist() == [
        i for i, t in enumerate(theirs) if t == teacher.eos_token_id
    ]
    teacher = byte_level(700)
    bare = PreTrainedTokenizerFast(tokenizer_object=teacher.backend_tokenizer)
    aligned = align(student, bare, [encoded(student, "the fox")])
    assert aligned.rows_N[-1] == aligned.rows_N[-2]  # an end that the teacher has no token for


@pytest.mark.parametrize("student", [byte_level, metaspace], ids=["byte-level", "llama"])
def test_markers_of_a_chat_have_no_text_and_the_text_behind_them_is_aligned(student: Any) -> None:
    student, teacher = student(), byte_level(700)
    chat = f"{TURN}the fox{TURN}jumps over"
    ids = student(chat, add_special_tokens=False).input_ids
    aligned = align(student, teacher, [ids])
    assert teacher.decode(aligned.tokens_BU[0][: aligned.documents[0][1]]) == "the foxjumps over"
    second = ids.index(ids[0], 1)
    assert aligned.rows_N[0] == -1
    assert aligned.rows_N[second] == aligned.rows_N[second - 1] >= 0
    assert aligned.rows_N[-1] == aligned.documents[0][1] - 1


def test_the_space_before_a_piece_is_read_once() -> None:
    """By a teacher that puts one before every text; this one stands for it."""
    student, teacher = byte_level(700), metaspace(begin=False)
    ids = plain_ids(student, "lazy quick fox")[1:]
    assert student.decode(ids) == " quick fox"
    aligned = align(student, teacher, [ids])
    theirs = aligned.tokens_BU[0, : aligned.documents[0][1]]
    assert teacher.convert_ids_to_tokens(theirs) == ["\u2581quick", "\u2581fox"]
    assert aligned.rows_N.tolist() == [0, 1]


def test_special_tokens_of_the_teacher_that_a_text_spells_out_are_text() -> None:
    student, teacher = metaspace(scheme="never"), byte_level(700)
    ids = plain_ids(student, "a </s> b")
    aligned = align(student, teacher, [ids])
    assert teacher.eos_token_id not in aligned.tokens_BU[0, : aligned.documents[0][1]]
    assert aligned.rows_N[-1] == aligned.documents[0][1] - 1


@pytest.mark.parametrize("known", ["student", "teacher"])
def test_what_a_tokenizer_does_not_know_ends_the_alignment_of_its_piece(known: str) -> None:
    student, teacher = byte_level(400), metaspace(begin=False, scheme="never", fallback=False)
    if known == "teacher":
        student, teacher = teacher, student
    before, behind = (len(plain_ids(student, part)) for part in ("the fox", " the fox"))
    first, second = (encoded(student, t) for t in ("the fox \U0001f600 the fox", "the fox"))
    rows = align(student, teacher, [first, second]).rows_N
    assert (rows[:before] >= 0).all()
    assert (rows[len(first) - behind - 1 : len(first)] == -1).all()
    assert (rows[len(first) :] >= 0).all()


def test_an_id_beyond_the_vocabulary_ends_the_alignment_of_its_piece() -> None:
    own = byte_level(400)
    ids = [*plain_ids(own, "the fox"), 100_000, *plain_ids(own, "the fox")]
    assert align(own, own, [ids, ids[:2]]).rows_N[: len(ids)].tolist() == [0, 1, -1, -1, -1]


def test_a_teacher_that_normalises_a_text_is_aligned_as_far_as_it_is_the_same() -> None:
    backend = Tokenizer.from_str(byte_level(700).backend_tokenizer.to_str())
    backend.normalizer = normalizers.NFC()
    student, teacher = byte_level(400), fast(backend, begin=False)
    ids = plain_ids(student, "the fox e\u0301 the fox")
    rows = align(student, teacher, [ids]).rows_N
    assert (rows[:2] >= 0).all()
    assert (rows[-3:] == -1).all()


def test_a_student_whose_begin_token_is_its_end_token_has_both() -> None:
    backend = Tokenizer.from_str(byte_level(400).backend_tokenizer.to_str())
    end = (END, backend.token_to_id(END))
    backend.post_processor = processors.TemplateProcessing(single=f"{END} $A", special_tokens=[end])
    student = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=END, eos_token=END)
    ids, teacher = encoded(student, "the fox"), byte_level(700, begin=True)
    assert ids[0] == ids[-1]
    aligned = align(student, teacher, [ids])
    first, last = aligned.tokens_BU[0][aligned.rows_N[[0, -1]]].tolist()
    assert [first, last] == [teacher.bos_token_id, teacher.eos_token_id]


def test_a_unigram_student_is_aligned_too() -> None:
    student, teacher = unigram(), byte_level(400)
    ids = encoded(student, "the quick brown fox")
    aligned = align(student, teacher, [[student.eos_token_id], ids])
    assert aligned.rows_N[-2] >= 0
    begin, end = aligned.documents[0][1:3]
    assert teacher.decode(aligned.tokens_BU[0, begin : end - 1]) == "the quick brown fox"


def test_a_slow_tokenizer_is_refused_by_its_key() -> None:
    class Slow:
        is_fast = False
        name_or_path = "./old"

    message = r"^data\.tokenizer: \./old: .* found a slow one, Slow: choose"
    with pytest.raises(ConfigError, match=message):
        Alignment(Slow(), byte_level())
    with pytest.raises(ConfigError, match=r"^teacher\.model: \./old: .* found a slow one"):
        Alignment(byte_level(), Slow())


def test_a_tokenizer_whose_tokens_are_no_bytes_is_refused() -> None:
    backend = Tokenizer(models.WordPiece({"[UNK]": 0, "the": 1, "##s": 2}, unk_token="[UNK]"))
    backend.decoder = decoders.WordPiece()
    other = PreTrainedTokenizerFast(tokenizer_object=backend, name_or_path="./bert")
    with pytest.raises(ConfigError, match=r"^teacher\.model: \./bert: .* decoder, WordPiece"):
        Alignment(byte_level(), other)
    backend.decoder = None
    other = PreTrainedTokenizerFast(tokenizer_object=backend)
    with pytest.raises(ConfigError, match=r"^data\.tokenizer: .* decoder, NoneType"):
        Alignment(other, byte_level())
