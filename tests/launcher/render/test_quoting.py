import subprocess

import pytest

from alignkd.errors import UserError
from launcher.render.quoting import sbatch_word, shell_word

NASTY = ["with space", "quo'te", 'dou"ble', "do$llar", "back`tick", "ha#sh", "per%cent", "semi;colon", "*"]


def parse_directive(line: str) -> str:
    """One option of an #SBATCH line, as sbatch parses quotes, backslashes and comments."""
    text, quote, index = "", None, 0
    while index < len(line):
        char = line[index]
        if char == "\\":
            index += 1
            text += line[index]
        elif quote:
            quote, text = (None, text) if char == quote else (quote, text + char)
        elif char in "'\"":
            quote = char
        elif char == "#" or char.isspace():
            break
        else:
            text += char
        index += 1
    return text


@pytest.mark.parametrize("value", [*NASTY, "back\\slash", "a\\\"b'#c"])
def test_quoted_words_are_read_back_unchanged(value: str) -> None:
    assert parse_directive(f"--x={sbatch_word(value)}") == f"--x={value}"
    shown = subprocess.run(["bash", "-c", f"printf %s {shell_word(value)}"], capture_output=True, text=True)
    assert shown.stdout == value


@pytest.mark.parametrize("value", ["a\nb", "a\0b", "a\rb", "\x1b[31m"])
def test_control_characters_are_refused(value: str) -> None:
    for quote in (sbatch_word, shell_word):
        with pytest.raises(UserError, match="control characters"):
            quote(value)
