import json
import time
from dataclasses import asdict
from pathlib import Path

from alignkd.run_folder.paths import RunPaths
from launcher.run.attempts import (
    Reason,
    begin,
    close,
    close_killed,
    exit_codes,
    open_attempt,
    read_history,
)


def checkpoint(run: Path, step: int) -> None:
    (run / "checkpoints" / f"step-{step}").mkdir(parents=True)
    (run / "checkpoints" / f"step-{step}" / "COMMITTED").touch()


def progress(run: Path, step: int, updated: float | None = None) -> None:
    facts = {"phase": "training", "step": step, "updated": updated or time.time() + 1}
    (run / "progress.json").write_text(json.dumps(facts))


def test_an_attempt_is_closed_with_its_steps_and_reason(tmp_path) -> None:
    checkpoint(tmp_path, 4)
    (tmp_path / "exits").mkdir(exist_ok=True)
    (tmp_path / "exits" / "rank-0").write_text("1 5.0\n")
    (tmp_path / "result.json").write_text('{"status": "stopped"}')
    attempt = begin(tmp_path, "7", "n[1-2]", 3.5)
    assert (attempt.number, attempt.first_step, attempt.queue_seconds) == (1, 4, 3.5)
    # What an earlier attempt left must not be taken for this one's.
    assert exit_codes(tmp_path) == {}
    assert not (tmp_path / "result.json").exists()
    checkpoint(tmp_path, 10)
    progress(tmp_path, 13)
    closed = close(tmp_path, attempt, Reason.CRASHED)
    assert (closed.last_step, closed.saved_step, closed.lost_steps) == (13, 10, 3)
    assert closed.progressed
    assert open_attempt(tmp_path) is None
    assert read_history(tmp_path) == [closed]


def test_a_checkpoint_that_the_ranks_refused_is_no_progress(tmp_path) -> None:
    """Step 8 has its marker, and is damaged: the ranks put it aside and resume from 4."""
    for step in (4, 8):
        checkpoint(tmp_path, step)
    attempt = begin(tmp_path, "7", "n1", None)
    assert attempt.first_step == 8
    (tmp_path / "checkpoints" / "step-8").rename(tmp_path / "checkpoints" / "step-8.passed-over")
    facts = {"phase": "training", "step": 7, "resumed_step": 4, "updated": time.time() + 1}
    (tmp_path / "progress.json").write_text(json.dumps(facts))
    checkpoint(tmp_path, 6)
    closed = close(tmp_path, attempt, Reason.CRASHED)
    assert (closed.first_step, closed.last_step, closed.saved_step, closed.lost_steps) == (4, 7, 6, 1)
    assert closed.progressed


def test_a_killed_attempt_is_closed_by_the_next_one(tmp_path) -> None:
    first = begin(tmp_path, "7", "n1", None)
    progress(tmp_path, 3, first.start + 60)
    assert begin(tmp_path, "7", "n2", None).number == 2
    (closed,) = read_history(tmp_path)
    assert (closed.reason, closed.end, closed.lost_steps) == ("lost", first.start + 60, 3)


def test_a_lost_node_is_the_reason_of_a_killed_attempt(tmp_path) -> None:
    first = begin(tmp_path, "7", "n[1-2]", None)
    asked = []

    def lost(nodes: str, since: float) -> list[str]:
        asked.append((nodes, since))
        return ["n2"]

    close_killed(tmp_path, lost)
    begin(tmp_path, "7", "n[3-4]", None)
    assert asked == [("n[1-2]", first.start)]
    (closed,) = read_history(tmp_path)
    assert (closed.reason, closed.bad_nodes) == ("node lost", ("n2",))


def test_progress_of_an_earlier_attempt_is_ignored(tmp_path) -> None:
    progress(tmp_path, 90, 1000.0)
    closed = close(tmp_path, begin(tmp_path, "7", "n1", None), Reason.CRASHED)
    assert (closed.last_step, closed.lost_steps) == (0, 0)


def test_torn_and_foreign_lines_are_skipped(tmp_path) -> None:
    closed = close(tmp_path, begin(tmp_path, "7", "n1", None), Reason.DONE)
    with RunPaths(tmp_path).attempts.open("a") as file:
        file.write('{"number": 2, "jo\n[]\n{"number": 3}\n')
        file.write(json.dumps({**asdict(closed), "of a later version": 1}) + "\n")
    assert read_history(tmp_path) == [closed, closed]
    RunPaths(tmp_path).open_attempt.write_text('{"unknown": 1}')
    assert open_attempt(tmp_path) is None


def test_exit_codes_are_in_the_order_in_which_ranks_ended(tmp_path) -> None:
    (tmp_path / "exits").mkdir(exist_ok=True)
    for rank, text in {0: "143 12.5", 1: "3 12.25", 10: "143 12.75"}.items():
        (tmp_path / "exits" / f"rank-{rank}").write_text(text + "\n")
    (tmp_path / "exits" / "rank-2").write_text("1 12.")  # still being written
    assert list(exit_codes(tmp_path).items()) == [(1, 3), (0, 143), (10, 143)]


def test_a_clock_that_is_off_does_not_change_which_rank_failed_first(tmp_path: Path) -> None:
    """Rank 2's node is an hour behind; rank 2 has seen the record of rank 1."""
    (tmp_path / "exits").mkdir()
    for rank, text in {0: "143 3600.5 2", 1: "3 3600.25 0", 2: "1 0.375 1"}.items():
        (tmp_path / "exits" / f"rank-{rank}").write_text(text + "\n")
    assert list(exit_codes(tmp_path).items()) == [(1, 3), (2, 1), (0, 143)]


def test_a_close_that_was_killed_between_its_two_files_counts_once(tmp_path: Path) -> None:
    attempt = begin(tmp_path, "7", "n1", None)
    before = RunPaths(tmp_path).open_attempt.read_text()
    close(tmp_path, attempt, Reason.CRASHED)
    RunPaths(tmp_path).open_attempt.write_text(before)  # killed before it was removed
    assert open_attempt(tmp_path) is None
    assert begin(tmp_path, "7", "n1", None).number == 2
    assert [closed.number for closed in read_history(tmp_path)] == [1]


def test_a_torn_line_spoils_no_other_line(tmp_path: Path) -> None:
    for _ in range(2):
        close(tmp_path, begin(tmp_path, "7", "n1", None), Reason.CRASHED)
    whole = RunPaths(tmp_path).attempts.read_text()
    lines = whole.splitlines()
    torn = lines[0][:30].encode() + b"\xff\0"
    # The first line is torn; the number 2 is taken.
    RunPaths(tmp_path).attempts.write_bytes(torn + f"\n{lines[1]}\n".encode())
    assert begin(tmp_path, "7", "n1", None).number == 3
    RunPaths(tmp_path).attempts.write_text(whole[:-30])  # the last line is torn; the next must start anew
    RunPaths(tmp_path).open_attempt.unlink()
    close(tmp_path, begin(tmp_path, "7", "n1", None), Reason.DONE)
    assert [closed.reason for closed in read_history(tmp_path)] == ["crashed", "done"]
