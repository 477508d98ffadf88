import math

import pytest

from alignkd.config.yaml_reader import MAX_BYTES, YamlError, dump_scalar, dump_yaml, parse_yaml, read_yaml
from alignkd.errors import UserError


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("2E5", 2e5),
        ("-.5", -0.5),
        ("1.", 1.0),
        ("017", 17),
        ("0x1F", 31),
        ("0o17", 15),
        ("true", True),
        ("~", None),
        ("", None),
        ("no", "no"),
        ("on", "on"),
        ("12:30:00", "12:30:00"),
        ("1_000", 1000),
        ("2026-01-02", "2026-01-02"),
        ("2026-01-02 10:00:00", "2026-01-02 10:00:00"),
        ("e5", "e5"),
        ("'1e-4'", "1e-4"),
        ("[1, 2e-1]", [1, 0.2]),
    ],
)
def test_scalars_are_read_as_yaml_1_2(text: str, value: object) -> None:
    parsed = parse_yaml(text)
    assert parsed == value
    assert type(parsed) is type(value)


def test_infinity_and_nan_are_read() -> None:
    assert parse_yaml("-.inf") == -math.inf
    assert math.isnan(parse_yaml(".nan"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb:\n  c: 1\n  c: 2\n", r"line 4: .*duplicate key \"c\" .*original value: \"1\""),
        ("a: &x [1]\nb: *x\n", r"line 2: aliases"),
        ("a: 1\nb: !!python/object/apply:os.system ['true']\n", "line 2: .*tag.*os.system"),
        ("a: !!set {b, c}\n", "line 1: .*tag '.*set'"),
        ("%YAML 1.1\n---\na: no\n", "directives"),
        ("a: !thing 1\n", "line 1: .*tag '!thing'"),
        ("[" * 5000, "levels deep"),
        ("a: " + "9" * 5000, "integer string conversion"),
        ("? [1, 2]\n: 3\n", r"the key `\(1, 2\)` is not text"),
        ("a: [{1: x}]\n", "the key `1` is not text; put it in quotes"),
        ("a: 1\nb\nc: 2\n", "line [23]: not valid YAML"),
        ("a: [1\nb: 2\n", "not valid YAML"),
        ("a: 1\n---\nb: 2\n", "not valid YAML"),
        ("a: \x00", "not readable"),
    ],
)
def test_unsafe_or_broken_text_is_refused_with_its_place(text: str, message: str) -> None:
    with pytest.raises(YamlError, match=message):
        parse_yaml(text)


def test_an_alias_bomb_is_refused_before_it_expands() -> None:
    rows = ["a0: &a0 [x, x]"] + [f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]" for n in range(1, 60)]
    with pytest.raises(YamlError, match="aliases"):
        parse_yaml("\n".join(rows))


def test_bytes_that_are_not_text_are_refused() -> None:
    with pytest.raises(YamlError, match="not readable as UTF-8"):
        parse_yaml(b"\xff\x80 a: 1")


def test_unusable_files_are_refused_by_name(tmp_path) -> None:
    with pytest.raises(UserError, match="alignkd init"):
        read_yaml(tmp_path / "missing.yaml")
    with pytest.raises(UserError, match="not a file"):
        read_yaml(tmp_path)
    large = tmp_path / "large.yaml"
    large.write_bytes(b"#" * (MAX_BYTES + 1))
    with pytest.raises(UserError, match="larger than"):
        read_yaml(large)
    broken = tmp_path / "broken.yaml"
    broken.write_text("a: {")
    with pytest.raises(UserError, match=r"broken\.yaml.*not valid YAML"):
        read_yaml(broken)


def test_dumped_data_reads_back_equal() -> None:
    nasty = ["1e-4", "0x1f", "yes", "no", "null", "~", "", " a ", "a: b", "#x", "12:30:00", "true", "-", "*a"]
    data = {"texts": nasty, "numbers": [1, -2.5, 1e-4, 2e-5, 1e300], "none": None, "flags": [True, False]}
    assert parse_yaml(dump_yaml(data)) == data
    assert [type(item) for item in parse_yaml(dump_yaml(nasty))] == [str] * len(nasty)


def test_a_value_that_occurs_twice_is_written_twice() -> None:
    shared = {"a": 1}
    assert "&" not in dump_yaml([shared, shared])


def test_keys_keep_their_order() -> None:
    data = {"b": 1, "a": {"d": 2, "c": 3}}
    assert dump_yaml(data) == "b: 1\na:\n  d: 2\n  c: 3\n"


def test_a_scalar_is_shown_as_a_file_would_write_it() -> None:
    values = [True, None, 2e-5, "1e-4", "a b", float("nan")]
    assert [dump_scalar(value) for value in values] == ["true", "null", "2e-05", "'1e-4'", "a b", ".nan"]


def test_a_text_that_is_read_again_gives_data_of_its_own() -> None:
    first = parse_yaml("a: {b: [1]}")
    first["a"]["b"].append(2)
    assert parse_yaml("a: {b: [1]}") == {"a": {"b": [1]}}
