import io
from dataclasses import replace

import pytest
from rich.console import Console

from alignkd.run_folder.progress import Snapshot
from launcher.run.progress_view import (
    BarView,
    Pace,
    PlainView,
    details,
    make_view,
)


def test_the_pace_of_a_resumed_run_counts_from_its_first_step() -> None:
    pace = Pace()
    assert pace.seconds_left(Snapshot("loading", 500, 1000, updated=0)) is None
    assert pace.seconds_left(Snapshot("training", 500, 1000, updated=10)) is None
    assert pace.seconds_left(Snapshot("training", 510, 1000, updated=30)) == pytest.approx(2 * 490)


def test_details_name_what_is_known() -> None:
    assert details(Snapshot("training", 1, 2, 2.34567, 12.345), 245) == (
        "training · loss 2.346 · 12.3 samples/s · 4:05 left"
    )
    waits = Snapshot("training", 1, 2, 2.5, data_wait_share=0.12)
    assert details(waits, None) == "training · loss 2.5 · 12% waiting for data"
    assert "waiting" not in details(replace(waits, data_wait_share=0.04), None)
    assert details(Snapshot("loading"), None) == "loading"
    assert details(Snapshot("indexing", done=0.256), None) == "indexing 26%"


def test_plain_lines_come_every_ten_seconds_and_with_every_phase() -> None:
    text, now = io.StringIO(), [0.0]
    view = PlainView(Console(file=text, width=200), clock=lambda: now[0])
    for second in range(31):
        now[0] = float(second)
        view.show(Snapshot("training", second, 100), None)
    view.show(Snapshot("saving", 30, 100), None)
    view.show(Snapshot("exporting", 30, 100), None)
    for second in range(31, 52):
        now[0] = float(second)
        view.show(Snapshot("indexing", done=second / 100), None)
    lines = text.getvalue().splitlines()
    assert [line.split(":")[0] for line in lines] == [
        "step 0/100",
        "step 10/100",
        "step 20/100",
        "step 30/100",
        "step 30/100",
        "indexing 31%",
        "indexing 41%",
        "indexing 51%",
    ]
    assert lines[4].endswith("exporting")


def test_a_bar_on_a_terminal_shows_steps_and_details() -> None:
    text = io.StringIO()
    console = Console(file=text, force_terminal=True, width=80)
    view = make_view(console)
    assert isinstance(view, BarView)
    view.show(Snapshot("training", 3, 9, 1.5, 7.0), 65.0)
    view.note("a [note] with brackets")
    view.close()
    assert "3/9" in text.getvalue()
    assert "1:05 left" in text.getvalue()
    assert "a [note] with brackets" in text.getvalue()


def test_a_pipe_gets_lines_instead_of_a_bar() -> None:
    assert isinstance(make_view(Console(file=io.StringIO())), PlainView)
