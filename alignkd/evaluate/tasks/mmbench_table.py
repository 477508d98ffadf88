"""MMBench's TSV: read without losing an option named "NA", and written again with predictions."""

from __future__ import annotations

import csv
import importlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from alignkd.errors import UserError, raise_if_passing
from alignkd.evaluate.files import read_text
from alignkd.evaluate.tasks.pictures import MAX_ENCODED_BYTES

LETTERS = "ABCD"
ROTATION = 1_000_000  # index = question + rotation x this
_COLUMNS = ("index", "question", *LETTERS, "image")
_LEFT_OUT_OF_UPLOAD = ("hint", "category", "source", "image", "comment", "l2-category", "prediction")
_PREDICTION_COLUMN = 6
_MOST_REFERENCE_CHARACTERS = 64  # a shorter `image` is the index of the row that holds the picture


@dataclass(frozen=True)
class TableRow:
    index: int
    cells: Mapping[str, str]
    where: str

    @property
    def question(self) -> int:
        """The same for all rotations of one question."""
        return self.index % ROTATION

    def prompt_options(self) -> dict[str, str]:
        """Letter -> text, up to the first that is empty, `nan` or `none`: what the official prompt shows."""
        options: dict[str, str] = {}
        for letter in LETTERS:
            if _is_none(self.cells[letter]):
                break
            options[letter] = self.cells[letter]
        return options

    def options(self) -> dict[str, str]:
        """Letter -> text of all options; "None" may be one."""
        return {letter: self.cells[letter] for letter in LETTERS if self.cells[letter].strip()}

    def text(self) -> str:
        """Hint, question and options, without the instruction."""
        hint = self.cells.get("hint", "")
        lines = [] if _is_none(hint) else [hint]
        lines.append(self.cells["question"])
        lines += [f"{letter}. {option}" for letter, option in self.prompt_options().items()]
        return "\n".join(lines)

    def answer(self) -> str:
        """The right letter; raises UserError where the file has none."""
        letter = self.cells.get("answer", "").strip()
        if letter not in self.options():
            raise UserError(
                f"{self.where}: `answer` must be the letter of an option, found {letter!r:.80}; the test "
                "split is published without answers: write the upload file instead"
            )
        return letter


def _is_none(text: str) -> bool:
    return text.strip().lower() in ("", "nan", "none")


def read_table(path: Path) -> list[TableRow]:
    """Raises UserError for a file without MMBench's columns, a broken row or a repeated index."""
    csv.field_size_limit(max(csv.field_size_limit(), MAX_ENCODED_BYTES))
    reader = csv.DictReader(io.StringIO(read_text(path), newline=""), delimiter="\t")
    rows: dict[int, TableRow] = {}
    try:
        missing = [column for column in _COLUMNS if column not in (reader.fieldnames or ())]
        if missing:
            raise UserError(f"{path}: has no column {', '.join(missing)}; it must be MMBench's TSV")
        for cells in reader:
            row = _row(cells, f"{path}: line {reader.line_num}")
            if row.index in rows:
                raise UserError(f"{row.where}: index {row.index} is there twice")
            rows[row.index] = row
    except csv.Error as error:
        raise UserError(f"{path}: line {reader.line_num}: {error}") from None
    if not rows:
        raise UserError(f"{path}: holds no question")
    return list(rows.values())


def _row(cells: Mapping[str | None, str | list[str] | None], where: str) -> TableRow:
    texts = {key: value for key, value in cells.items() if isinstance(key, str) and isinstance(value, str)}
    if len(texts) != len(cells):
        raise UserError(f"{where}: has another number of cells than the header")
    if not texts["index"].strip().isdecimal():
        raise UserError(f"{where}: `index` must be a whole number, found {texts['index']!r:.80}")
    return TableRow(int(texts["index"]), texts, where)


def encoded_image(row: TableRow, by_index: Mapping[int, TableRow]) -> str:
    """The row's base64 text, or that of the row whose index stands in its place."""
    text = row.cells["image"].strip()
    if len(text) <= _MOST_REFERENCE_CHARACTERS and text.isdecimal():
        holder = by_index.get(int(text))
        if holder is None:
            raise UserError(f"{row.where}: `image` refers to index {text}, which is not in the file")
        text = holder.cells["image"].strip()
    if not text:
        raise UserError(f"{row.where}: has no image")
    return text


def write_upload(rows: Sequence[TableRow], predictions: Sequence[str], out: Path) -> None:
    """The file that MMBench's server takes (``.xlsx``), or the same as ``.tsv``: columns as LLaVA's script
    writes them, the answer's text in ``prediction``."""
    header = [column for column in rows[0].cells if column not in _LEFT_OUT_OF_UPLOAD]
    table = [[*header[:_PREDICTION_COLUMN], "prediction", *header[_PREDICTION_COLUMN:]]]
    for row, prediction in zip(rows, predictions, strict=True):
        cells = [row.cells[column] for column in header]
        table.append([*cells[:_PREDICTION_COLUMN], prediction, *cells[_PREDICTION_COLUMN:]])
    try:
        if out.suffix == ".tsv":
            with out.open("w", encoding="utf-8", newline="") as file:
                csv.writer(file, delimiter="\t", lineterminator="\n").writerows(table)
        elif out.suffix == ".xlsx":
            _write_excel(table, out)
        else:
            raise UserError(f"{out}: the upload file must end in .xlsx, or in .tsv for a look at it")
    except OSError as error:
        raise_if_passing(error, out)
        raise UserError(f"{out}: cannot be written ({error})") from None


def _write_excel(table: Sequence[Sequence[str]], out: Path) -> None:
    try:
        openpyxl = importlib.import_module("openpyxl")
    except ImportError:
        raise UserError(
            f"{out}: Excel files need openpyxl (pip install openpyxl); .tsv needs nothing"
        ) from None
    book = openpyxl.Workbook(write_only=True)
    sheet = book.create_sheet()
    index = table[0].index("index")
    sheet.append(table[0])
    for cells in table[1:]:
        sheet.append([int(cell) if number == index else cell for number, cell in enumerate(cells)])
    book.save(out)
