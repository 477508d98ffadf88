"""The order of the parts and what is skipped; the parts themselves have tests of their own."""

import json
import subprocess
from pathlib import Path

import pytest

from alignkd.demo import __main__ as demo
from alignkd.errors import TrainingError


class Recorder:
    """Stands in for ``subprocess.run``: notes commands, and leaves what each of them would leave."""

    def __init__(self, failing=None):
        self.commands = []
        self.failing = failing

    def __call__(self, command, check):
        words = [Path(command[0]).name, *command[1:]]
        self.commands.append(words)
        if self.failing in words:
            return subprocess.CompletedProcess(command, 3)
        if "init" in words:
            Path(words[-1]).write_text("run: {}")
        elif "alignkd.demo.phone_models" in words:
            (folder := Path(words[-1]) / "models" / "tower").mkdir(parents=True)
            (folder / "config.json").write_text("{}")
        elif "export" in words:
            (out := Path(words[-1])).mkdir()
            (out / "text.gguf").write_bytes(b"")
        elif "alignkd.demo.vlm_pair" in words:
            (folder := Path(words[-1]) / "models" / words[3]).mkdir(parents=True)
            (folder / "config.json").write_text("{}")
        elif "sample-data" in words:
            (out := Path(words[words.index("--out") + 1])).mkdir()
            turns = [{"from": "human", "value": "2 plus 3?"}, {"from": "gpt", "value": "5"}]
            (out / "test.json").write_text(json.dumps([{"id": "0", "conversations": turns}]))
        elif "launch" in words:
            finish(Path(words[2]).parent / "runs" / words[words.index("--stage") + 1])
        elif "resume" in words:
            finish(Path(words[-1]))
        else:
            for model in words[2 : words.index("--task")]:
                name = model.partition("=")[0] if "=" in model else Path(model).parent.name
                answers = Path(words[words.index("--out") + 1]) / name / "sample.jsonl"
                answers.parent.mkdir(parents=True)
                answers.write_text('{"question_id": "0", "text": "5"}')
        return subprocess.CompletedProcess(command, 0)

    def names(self):
        return [words[1] for words in self.commands]


def finish(run):
    (run / "student").mkdir(parents=True, exist_ok=True)
    (run / "student" / "config.json").write_text("{}")
    (run / "result.json").write_text('{"seconds": 1, "peak_memory_bytes_per_rank": [1]}')
    (run / "metrics.jsonl").write_text("")


@pytest.fixture
def start(monkeypatch):
    """Runs the demo with a recorder and returns it."""
    reports = []

    def report(models, console, exported=()):
        reports.append([*(model.name for model in models), *exported])

    monkeypatch.setattr(demo, "print_report", report)

    def run(out, *, baseline=False, failing=None, vlm=False, phone=False):
        recorder = Recorder(failing)
        recorder.reports = reports
        monkeypatch.setattr(demo.subprocess, "run", recorder)
        if vlm:
            demo.run_vlm_demo(out)
        elif phone:
            demo.run_phone_demo(out)
        else:
            demo.run_demo(out, baseline=baseline)
        return recorder

    return run


def test_a_new_demo_runs_every_part_in_order(tmp_path, start):
    done = start(tmp_path / "demo")
    assert done.names() == ["init", "sample-data", "launch", "eval", "launch", "eval"]
    assert done.reports[-1] == ["teacher", "student"]


def test_a_second_demo_only_reports(tmp_path, start):
    start(tmp_path / "demo")
    again = start(tmp_path / "demo")
    assert again.names() == []
    assert len(again.reports) == 2


def test_an_interrupted_run_is_resumed(tmp_path, start):
    with pytest.raises(TrainingError, match="exit code 3"):
        start(tmp_path / "demo", failing="teacher")
    (tmp_path / "demo" / "runs" / "teacher").mkdir(parents=True)
    done = start(tmp_path / "demo")
    assert done.names() == ["resume", "eval", "launch", "eval"]


def test_baseline_is_added_to_a_finished_demo(tmp_path, start):
    start(tmp_path / "demo")
    done = start(tmp_path / "demo", baseline=True)
    assert done.names() == ["launch", "eval"]
    assert done.reports[-1] == ["teacher", "student", "baseline"]


def test_training_uses_two_local_nodes_and_says_that_they_have_no_gpu(tmp_path, start):
    launches = [words for words in start(tmp_path / "demo").commands if "launch" in words]
    assert all(words[-5:] == ["--nodes", "2", "--backend", "local", "--cpu"] for words in launches)


def test_the_second_form_makes_its_student_from_the_trained_teacher(tmp_path, start):
    done = start(tmp_path / "demo", vlm=True)
    parts = [words[3] if "-m" in words else words[1] for words in done.commands]
    assert parts == [
        *("sample-data", "teacher", "launch", "eval"),
        *("student", "launch", "eval", "launch", "eval"),
    ]
    stages = [words[words.index("--stage") + 1] for words in done.commands if "launch" in words]
    assert stages == ["teacher", "alone", "student"]
    assert done.reports[-1] == stages
    assert start(tmp_path / "demo", vlm=True).commands == []


def test_the_third_form_exports_its_student_and_asks_the_exports_too(tmp_path, start, capsys):
    done = start(tmp_path / "demo", phone=True)
    parts = ["phone_models" if "-m" in words else words[1] for words in done.commands]
    assert parts == ["sample-data", "phone_models", "launch", "launch", "export", "export", "eval"]
    assert done.reports[-1] == ["teacher", "student", "f16", "q8_0"]
    assert "q8_0 answers 1 of 1 questions as the student does" in capsys.readouterr().out
    assert start(tmp_path / "demo", phone=True).commands == []
