from __future__ import annotations

import hashlib
import pickle
import subprocess
import sys

import pytest

from alignkd.data.tokenizer import SentencePieceTokenizer
from alignkd.errors import UserError


def test_each_chunk_begins_with_its_own_space_piece(tokenizer):
    assert tokenizer.encode("a") != tokenizer.encode(" a")
    assert tokenizer.encode("") == []
    assert tokenizer.decode(tokenizer.encode("How many are there?")) == "How many are there?"


@pytest.mark.parametrize("text", ["</s>", "<s>", "<unk>", "a</s>b", "<0x0A>", "<image>"])
def test_text_never_becomes_a_special_id(tokenizer, text):
    ids = tokenizer.encode(text)
    assert not {tokenizer.bos_id, tokenizer.eos_id, tokenizer.unk_id} & set(ids)
    assert tokenizer.decode(ids) == text


def test_encoding_many_chunks_equals_encoding_each(tokenizer):
    texts = ["", "a red circle", "\n", "Größe, 大", "a\0b"] * 20
    assert tokenizer.encode_many(texts) == [tokenizer.encode(text) for text in texts]
    assert tokenizer.encode_many([]) == []


def test_decoding_leaves_special_ids_out(tokenizer):
    ids = tokenizer.encode("two")
    assert tokenizer.decode([tokenizer.bos_id, *ids, tokenizer.eos_id, tokenizer.unk_id, -200, 600]) == "two"


def test_special_ids_and_fingerprint_are_those_of_the_file(tokenizer, fixture_folder):
    assert (tokenizer.unk_id, tokenizer.bos_id, tokenizer.eos_id, len(tokenizer)) == (0, 1, 2, 600)
    model = (fixture_folder / "student" / "tokenizer.model").read_bytes()
    assert tokenizer.fingerprint() == hashlib.sha256(model).hexdigest()


def test_a_tokenizer_can_be_sent_to_another_process(tokenizer):
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert copy.encode("a red circle") == tokenizer.encode("a red circle")


def test_a_missing_or_broken_model_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"tokenizer\.model: cannot be read"):
        SentencePieceTokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"not a model")
    with pytest.raises(UserError, match=r"tokenizer\.model: not a sentencepiece model"):
        SentencePieceTokenizer.from_folder(tmp_path)


def test_the_module_needs_neither_torch_nor_transformers():
    code = "import sys, alignkd.data.tokenizer; print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
