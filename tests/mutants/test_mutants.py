"""The list of ``make mutants`` fits the code, and its runner tells a mutant that is noticed from one that is
not."""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from pathlib import Path

import pytest

from tests.mutants.catalogue import ROOT, Mutant, read_mutants
from tests.mutants.runner import Verdict, judge

MUTANTS = read_mutants()


def test_every_mutant_can_be_applied() -> None:
    assert [f"{mutant.file}: {mutant.breaks}" for mutant in MUTANTS if mutant.problem(ROOT)] == []


def test_every_test_of_a_mutant_exists() -> None:
    for test in sorted({test for mutant in MUTANTS for test in mutant.tests}):
        file, _, function = test.partition("::")
        name = re.escape(function.partition("[")[0]) or "test_"
        assert re.search(rf"^def {name}", (ROOT / file).read_text(), re.MULTILINE), test


def test_the_list_covers_every_room_and_no_mutant_twice() -> None:
    assert len(MUTANTS) >= 60
    assert Counter((mutant.file, mutant.old, mutant.new) for mutant in MUTANTS).most_common(1)[0][1] == 1
    rooms = {"/".join(mutant.file.split("/")[:2]) for mutant in MUTANTS}
    alignkd = {
        f"alignkd/{name}" for name in ("losses", "engine", "teacher", "data", "checkpoint", "run_folder")
    }
    assert alignkd | {"launcher/run", "launcher/backends", "launcher/render"} <= rooms
    assert any(room.startswith("ds_configs/") for room in rooms)


@pytest.fixture
def project(tmp_path: Path) -> Path:
    (tmp_path / "product.py").write_text(
        "def add(a, b):\n    return a + b\n\n\ndef twice(a):\n    return 2 * a\n"
    )
    (tmp_path / "test_product.py").write_text(
        "from product import add\n\n\ndef test_add():\n    assert add(1, 2) == 3\n"
    )
    subprocess.run(["git", "init", "--quiet"], cwd=tmp_path, check=True)
    return tmp_path


def test_the_runner_judges_by_the_tests(project: Path) -> None:
    test = ("test_product.py::test_add",)
    mutants = [
        Mutant("addition", "product.py", "a + b", "a - b", test),
        Mutant("doubling", "product.py", "2 * a", "3 * a", test),
        Mutant("doubling", "product.py", "2 * a", "a + a", test, survives="it is the same"),
        Mutant("syntax", "product.py", "return a + b", "return a +", test),
    ]
    verdicts = [outcome.verdict for outcome in judge(mutants, project, jobs=2)]
    assert verdicts == [Verdict.KILLED, Verdict.SURVIVED, Verdict.EXPLAINED, Verdict.ERROR]
    assert "return a + b" in (project / "product.py").read_text(), "the tree itself is never changed"


def test_tests_that_fail_without_a_mutant_judge_nothing(project: Path) -> None:
    (project / "test_product.py").write_text("def test_add():\n    assert False\n")
    mutants = [Mutant("addition", "product.py", "a + b", "a - b", ("test_product.py::test_add",))]
    with pytest.raises(RuntimeError, match="without a mutant, the tests do not pass"):
        list(judge(mutants, project, jobs=1))


def test_a_text_that_occurs_never_or_twice_is_a_problem(project: Path) -> None:
    for old in ("return", "a * b"):
        assert "instead of once" in str(Mutant("", "product.py", old, "x", ()).problem(project))
    assert Mutant("", "product.py", "a + b", "a + b", ()).problem(project) == "it changes nothing"
