import gzip

import pytest

from alignkd.errors import UserError
from alignkd.evaluate.files import Row, read_json, read_json_lines, read_text


def test_gzipped_file_reads_like_the_plain_one(tmp_path):
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"a": 1}\n'))
    assert [row.value for row in read_json_lines(tmp_path / "a.jsonl.gz")] == [{"a": 1}]


def test_rows_know_their_line_although_blank_lines_are_skipped(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"a": 1}\n\n{"a": 2}\r\n')
    assert [row.where for row in read_json_lines(tmp_path / "a.jsonl")] == [
        f"{tmp_path}/a.jsonl: line 1",
        f"{tmp_path}/a.jsonl: line 3",
    ]


def test_a_line_separator_inside_a_text_does_not_end_the_line(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"a": "x\u2028y\x85z"}\n', encoding="utf-8")
    assert read_json_lines(tmp_path / "a.jsonl")[0].value == {"a": "x\u2028y\x85z"}


def test_byte_order_mark_is_no_part_of_the_first_line(tmp_path):
    (tmp_path / "a.jsonl").write_text('\ufeff{"a": 1}\n', encoding="utf-8")
    assert read_json_lines(tmp_path / "a.jsonl")[0].value == {"a": 1}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": 1}\n{"a": \n', "line 2: not JSON"),
        (b'{"a": 1}\n[1]\n', "line 2: must be a JSON object"),
        (b"\n \n", "is empty"),
        (b"\xff\xfe", "cannot be read"),
        (b"[" * 100_000, "line 1: not JSON"),
    ],
)
def test_broken_lines_are_one_error_that_names_the_line(tmp_path, content, message):
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_json_lines(tmp_path / "a.jsonl")


def test_damaged_gzip_is_an_error(tmp_path):
    (tmp_path / "a.gz").write_bytes(gzip.compress(b"x" * 1000)[:-12])
    (tmp_path / "b.gz").write_bytes(b"not gzip")
    for name in ("a.gz", "b.gz"):
        with pytest.raises(UserError, match=f"{name}: cannot be read"):
            read_text(tmp_path / name)


def test_missing_file_and_bad_json_are_errors(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        read_json(tmp_path / "none.json")
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(UserError, match="not JSON"):
        read_json(tmp_path / "a.json")


def test_ids_are_texts_or_whole_numbers():
    assert Row("here", {"a": 3}).id("a") == Row("here", {"a": "3"}).id("a") == "3"
    assert Row("here", {"a": 3}).published_id("a") == 3
    for value in (True, 1.5, None, []):
        with pytest.raises(UserError, match="here: `a` must be a text or a whole number"):
            Row("here", {"a": value}).id("a")


def test_text_must_be_a_text():
    with pytest.raises(UserError, match="here: `a` must be a text, found 3"):
        Row("here", {"a": 3}).text("a")
