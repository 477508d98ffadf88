from __future__ import annotations

import random

import pytest

from alignkd.data.batch import IGNORE_INDEX, IMAGE_TOKEN_ID
from alignkd.data.records import Turn, parse_sample
from alignkd.data.templates import (
    SYSTEM_SENTENCE,
    conversation_parts,
    embedded_lengths,
    encode,
    encode_prompt,
    template_problem,
)
from alignkd.data.token_counts import TokenCounter


def turns(*texts: str) -> list[Turn]:
    return [Turn("gpt" if number % 2 else "human", text) for number, text in enumerate(texts)]


@pytest.mark.parametrize("name", ["plain", "v1", "rounds", "text"])
def test_ids_and_labels_equal_those_of_the_authors(name, cases, expected, tokenizer):
    sample = parse_sample(cases[name]["record"], "cases.json", 0, 0)
    encoded = encode(sample.turns, cases[name]["template"], tokenizer)
    assert encoded.ids == expected[f"{name}.input_ids"][0].tolist()
    assert encoded.labels == expected[f"{name}.labels"][0].tolist()


def test_the_system_sentence_equals_that_of_the_fixture(expected, tokenizer):
    ids = expected["text.input_ids"][0].tolist()
    assert tokenizer.decode(ids).startswith(SYSTEM_SENTENCE + " USER: how many are there? ASSISTANT: three")


@pytest.mark.parametrize("answer", ["red </s> blue", "<s>", "<unk>", "see <image> here", "a </s>USER: b"])
def test_special_text_in_a_turn_stays_text(answer, tokenizer):
    for conversation in (turns("what?", answer), turns(answer.replace("<image>", ""), "two")):
        encoded = encode(conversation, "v1", tokenizer)
        assert encoded.ids.count(tokenizer.eos_id) == 1
        assert encoded.ids.count(tokenizer.bos_id) == 1
        assert tokenizer.unk_id not in encoded.ids
        assert IMAGE_TOKEN_ID not in encoded.ids
        assert encoded.ids[-1] == encoded.labels[-1] == tokenizer.eos_id


@pytest.mark.parametrize("question", ["<image>\nwhat?", "what?\n<image>", "<image>what?", " what? <image> "])
def test_the_only_marker_moves_to_the_front_of_its_turn(question, tokenizer):
    assert encode(turns(question, "two"), "v1", tokenizer) == encode(
        turns("<image>\nwhat?", "two"), "v1", tokenizer
    )


def test_several_markers_of_a_turn_stay_where_they_are(tokenizer):
    encoded = encode(turns("left <image><image> right <image>", "two"), "v1", tokenizer)
    first, second, third = (i for i, token in enumerate(encoded.ids) if token == IMAGE_TOKEN_ID)
    assert second == first + 1
    assert tokenizer.decode(encoded.ids[:first]).endswith("USER: left ")
    assert tokenizer.decode(encoded.ids[second + 1 : third]).strip() == "right"
    assert tokenizer.decode(encoded.ids[third + 1 :]).split() == ["ASSISTANT:", "two"]


def test_only_answers_and_their_end_are_supervised_in_every_round(tokenizer):
    encoded = encode(turns("<image>\nwhat?", "a red circle", "more? ASSISTANT: no", "two"), "v1", tokenizer)
    supervised = [label for label in encoded.labels if label != IGNORE_INDEX]
    end = tokenizer.eos_id
    assert supervised == [*tokenizer.encode("a red circle"), end, *tokenizer.encode("two"), end]
    assert all(
        label in (IGNORE_INDEX, token) for token, label in zip(encoded.ids, encoded.labels, strict=True)
    )


def test_plain_drops_the_question_and_supervises_everything_after_the_image(tokenizer):
    encoded = encode(turns("describe it: <image>", "a red circle"), "plain", tokenizer)
    caption = tokenizer.encode("a red circle\n")
    assert encoded.ids == [tokenizer.bos_id, IMAGE_TOKEN_ID, *caption]
    assert encoded.labels == [IGNORE_INDEX, IGNORE_INDEX, *caption]


def test_plain_needs_an_image_and_one_round():
    assert template_problem(turns("<image>", "a"), "plain") is None
    assert "needs an image" in str(template_problem(turns("what?", "a"), "plain"))
    assert "one question" in str(template_problem(turns("<image>", "a", "b", "c"), "plain"))
    assert template_problem(turns("what?", "a", "b", "c"), "v1") is None


def test_a_prompt_is_everything_before_the_answer(cases, expected, tokenizer):
    for name in ("v1", "text", "rounds"):
        sample = parse_sample(cases[name]["record"], "cases.json", 0, 0)
        prompt = encode_prompt(sample.turns[:-1], "v1", tokenizer)
        ids, labels = (expected[f"{name}.{kind}"][0].tolist() for kind in ("input_ids", "labels"))
        answer = len(tokenizer.encode(sample.turns[-1].text)) + 1
        assert prompt == ids[:-answer]
        assert labels[-answer] != IGNORE_INDEX
        assert tokenizer.decode(prompt).endswith(" ASSISTANT:")
    assert encode_prompt(turns("<image> what?"), "plain", tokenizer) == [tokenizer.bos_id, IMAGE_TOKEN_ID]


def test_lengths_and_masks_hold_for_random_conversations(tokenizer):
    pick = random.Random(0)
    words = ["red", "circle", "<image>", "\n", "  ", "</s>", "ASSISTANT:", "Größe", "?", "123", "x" * 30]
    for _ in range(200):
        texts = [" ".join(pick.choices(words, k=pick.randint(1, 8))) for _ in range(2 * pick.randint(1, 3))]
        conversation = turns(*texts)
        encoded = encode(conversation, "v1", tokenizer)
        images = sum(text.count("<image>") for text in texts[::2])
        assert encoded.ids.count(IMAGE_TOKEN_ID) == images
        parts = conversation_parts(conversation, "v1")
        lengths = embedded_lengths([parts, parts], TokenCounter(tokenizer), vision_tokens=9)
        assert lengths.tolist() == [len(encoded.ids) + 8 * images] * 2
        answers = [[*tokenizer.encode(text), tokenizer.eos_id] for text in texts[1::2]]
        supervised = [label for label in encoded.labels if label != IGNORE_INDEX]
        assert supervised == [token for answer in answers for token in answer]
