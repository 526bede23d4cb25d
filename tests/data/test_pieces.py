import random
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from megadistill.data.pieces import split_text


@given(text=st.text(alphabet="ab \n", max_size=300), cuts=st.lists(st.integers(0, 300)))
def test_pieces_make_the_text_again_and_do_not_depend_on_the_chunks(text, cuts):
    edges = [0, *sorted(c for c in cuts if c <= len(text)), len(text)]
    chunks = [text[a:b] for a, b in pairwise(edges)]
    pieces = list(split_text(chunks, piece=20))
    assert "".join(pieces) == text
    assert all(0 < len(p) <= 20 for p in pieces) or pieces == [""]
    assert pieces == list(split_text([text], piece=20))


def test_a_text_without_spaces_is_cut_anyway():
    assert [len(p) for p in split_text(["x" * 50], piece=20)] == [20, 20, 10]


def test_pieces_give_the_tokens_of_the_whole_text(tokenizer):
    backend = AutoTokenizer.from_pretrained(tokenizer).backend_tokenizer
    draw = random.Random(0)
    words = ["def", "x", " ", "  ", "\n", "\n\n", "\n    ", "(", "é", "return", "\t", "1"]
    text = " ".join("".join(draw.choices(words, k=5)) for _ in range(2000))

    def ids(t):
        return backend.encode(t, add_special_tokens=False).ids

    pieces = list(split_text([text], piece=500))
    assert len(pieces) > 20
    assert [i for p in pieces for i in ids(p)] == ids(text)
