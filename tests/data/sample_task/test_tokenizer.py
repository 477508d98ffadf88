import numpy as np
import pytest

from alignkd.data.records import Turn
from alignkd.data.sample_task.digits import Grid
from alignkd.data.sample_task.questions import KINDS, POSITIONS, caption, draw_question
from alignkd.data.sample_task.tokenizer import VOCABULARY, train_tokenizer
from alignkd.data.templates import IGNORE_INDEX, SYSTEM_SENTENCE, encode
from alignkd.data.tokenizer import SentencePieceTokenizer

GRIDS = [Grid((3, 5, 5, 9), np.zeros((32, 32), np.uint8)), Grid((0, 1, 2, 4), np.zeros((32, 32), np.uint8))]


@pytest.fixture(scope="module")
def tokenizer():
    return SentencePieceTokenizer(train_tokenizer(), "sample")


def test_special_ids_are_llamas(tokenizer):
    assert (tokenizer.unk_id, tokenizer.bos_id, tokenizer.eos_id) == (0, 1, 2)
    assert len(tokenizer) == VOCABULARY


def test_system_sentence_is_one_token(tokenizer):
    assert len(tokenizer.encode(SYSTEM_SENTENCE)) == 1


def test_unseen_text_survives_encoding_and_decoding(tokenizer):
    text = "Übermut? 12 #\n\u4f60"
    assert tokenizer.encode(text).count(tokenizer.unk_id) == 0
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_training_gives_the_same_bytes_each_time():
    assert train_tokenizer() == train_tokenizer()


def test_a_caption_is_four_positions_and_four_digits(tokenizer):
    ids = tokenizer.encode(caption(GRIDS[0]))
    assert [tokenizer.decode([token]) for token in ids[::2]] == list(POSITIONS)
    assert [tokenizer.decode([token]) for token in ids[1::2]] == ["3", "5", "5", "9"]


@pytest.mark.parametrize("kind", KINDS)
def test_label_mask_keeps_the_answer_whole(tokenizer, kind):
    """Pieces may span words here, but never the border of an answer."""
    random = np.random.default_rng(1)
    count = {"two_images": 2, "text": 0}.get(kind, 1)
    for _ in range(50):
        question = draw_question(kind, GRIDS[:count], random)
        turns = [Turn("human", "<image>\n" * count + question.text), Turn("gpt", question.answer)]
        labels = [label for label in encode(turns, "v1", tokenizer).labels if label != IGNORE_INDEX]
        assert labels[-1] == tokenizer.eos_id
        assert tokenizer.decode(labels).strip() == question.answer
        assert len(labels) == 2
