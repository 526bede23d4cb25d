"""Text for the online teacher: of a stream without an end, as many blocks as the steps need."""

import pytest

from megadistill.train.online.online_teacher import blocks_needed
from tests.train.stores import make_config


@pytest.mark.parametrize(("steps", "blocks"), [(1, 1), (2, 2), (5, 4), (6, 5)])
def test_an_endless_stream_is_read_for_every_sequence_of_the_steps(tmp_path, steps, blocks):
    data = {"source": None, "name": "a/b", "streaming": True, "block_size": 10}
    train = {"steps": steps, "global_batch": 8, "warmup_steps": 0}
    config = make_config(tmp_path, data=data, train=train, teacher={"mode": "online"})
    assert blocks_needed(config) == blocks


def test_a_corpus_with_an_end_is_read_whole(tmp_path):
    assert blocks_needed(make_config(tmp_path, teacher={"mode": "online"})) is None
