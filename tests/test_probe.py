"""`alignkd probe`: the fixture's values from PNG and text, and what it refuses."""

from __future__ import annotations

import json
import shutil
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from alignkd.config import load_run_config
from alignkd.engine.optimizer_step import term_weights
from alignkd.errors import UserError
from alignkd.models.adapters import seeded_adapters
from alignkd.models.configuration import read_model_config
from alignkd.models.loading import model_facts
from alignkd.probe import ProbeResult, run_probe, run_probe_of_run
from alignkd.run_folder.checkpoints import step_folder
from alignkd.run_folder.paths import RunPaths
from tests import tiny, vlm
from tests.checkpoint.test_damaged_checkpoints import go_on
from tests.model_folders import copy_model
from tests.models.families import reference
from tests.ranks import RankPool

RAGGED = ("v1", "rounds", "text")


def write_data(folder: Path, *records: Any) -> Path:
    path = folder / "data.json"
    path.write_text(json.dumps(records))
    return path


def probe(data: Path, **changes: Any) -> ProbeResult:
    arguments: dict[str, Any] = {
        "teacher": tiny.TEACHER,
        "student": tiny.STUDENT,
        "data": data,
        "image_folder": tiny.FOLDER,
        "template": "v1",
        "image_aspect_ratio": "pad",
        "adapters": None,
        "dtype": "float32",
        "seed": 0,
    }
    return run_probe(**{**arguments, **changes})


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("adapters") / "adapters.safetensors"
    save_file(tiny.fixture_adapters().state_dict(), path)
    return path


@pytest.fixture(scope="module")
def text_only(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"), tiny.CASES["text"]["record"])


@pytest.mark.parametrize(
    "cases", [*((case,) for case in tiny.CASES), *permutations(RAGGED), ("v1", "v1")], ids="+".join
)
def test_probe_gives_the_fixture_values(tmp_path: Path, adapters: Path, cases: tuple[str, ...]) -> None:
    data = write_data(tmp_path, *(tiny.CASES[case]["record"] for case in cases))
    result = probe(data, adapters=adapters, template=tiny.CASES[cases[0]]["template"]).as_dict()
    one = len(set(cases)) == 1
    expected = tiny.EXPECTED_LOSSES[cases[0] if one else "batch v1+rounds+text"]
    assert set(result["terms"]) == set(expected["terms"]) - {"forward_kl"}
    for name, value in result["terms"].items():
        assert value == pytest.approx(expected["terms"][name], rel=1e-5), name
    repeats = len(cases) if one else 1
    assert result["counts"] == {name: expected["counts"][name] * repeats for name in result["counts"]}
    assert set(result["gradient_norms"]) == {*result["counts"], "total"}
    for name, norm in result["gradient_norms"].items():
        without_image = cases == ("text",) and name in ("attention", "vision_all", "vision_focus")
        assert (norm == 0) == without_image, name


def test_double_precision_agrees_to_more_digits(tmp_path: Path, adapters: Path) -> None:
    data = write_data(tmp_path, tiny.CASES["v1"]["record"])
    single, double = (probe(data, adapters=adapters, dtype=dtype).terms for dtype in ("float32", "float64"))
    for name, value in double.items():
        assert value == pytest.approx(single[name], rel=1e-4), name
    assert double != single


def test_gradient_norms_obey_the_triangle_inequality(tmp_path: Path, adapters: Path) -> None:
    """Gradients of the terms point in different directions, so that of the total is no sum."""
    norms = probe(write_data(tmp_path, tiny.CASES["v1"]["record"]), adapters=adapters).gradient_norms
    parts = [norms[name] * (0.1 if name == "vision_focus" else 1.0) for name in norms if name != "total"]
    assert 2 * max(parts) - sum(parts) <= norms["total"] <= sum(parts)


def test_the_seed_determines_the_adapters_and_nothing_else(tmp_path: Path) -> None:
    data = write_data(tmp_path, tiny.CASES["v1"]["record"])
    torch.manual_seed(1)
    first = probe(data, seed=3)
    torch.manual_seed(2)
    assert probe(data, seed=3) == first
    other = probe(data, seed=4)
    for name in ("ce", "reverse_kl"):
        assert other.terms[name] == first.terms[name], name
    for name in ("attention", "vision_all", "vision_focus", "total"):
        assert other.terms[name] != first.terms[name], name


def test_a_drawn_adapter_can_be_given_as_a_file(tmp_path: Path) -> None:
    data = write_data(tmp_path, tiny.CASES["v1"]["record"])
    drawn = seeded_adapters(read_model_config(tiny.TEACHER), read_model_config(tiny.STUDENT), 3)
    save_file(drawn.state_dict(), tmp_path / "adapters.safetensors")
    assert probe(data, adapters=tmp_path / "adapters.safetensors", seed=9) == probe(data, seed=3)


def test_an_unknown_dtype_lists_the_valid_ones(text_only: Path) -> None:
    with pytest.raises(UserError, match="--dtype int8: valid are float32, float64, bfloat16"):
        probe(text_only, dtype="int8")


def test_adapters_of_another_pair_are_refused(tmp_path: Path, text_only: Path) -> None:
    path = tmp_path / "adapters.safetensors"
    other = seeded_adapters(read_model_config(tiny.STUDENT), read_model_config(tiny.TEACHER), 0)
    save_file(other.state_dict(), path)
    with pytest.raises(UserError, match=r"adapters.safetensors: holds .*; these models need "):
        probe(text_only, adapters=path)


@pytest.mark.parametrize(
    ("record", "parts"),
    [
        ({"id": "x7", "conversations": []}, ("data.json", "x7")),
        ({**tiny.CASES["v1"]["record"], "image": "gone.png"}, ("data.json", "missing image", "gone.png")),
        ({**tiny.CASES["v1"]["record"], "image": "../tiny.py"}, ("leaves the image folder",)),
        ({**tiny.CASES["v1"]["record"], "image": "cases.json"}, ("broken image", "cases.json")),
    ],
    ids=["no turns", "missing image", "leaving image", "broken image"],
)
def test_a_bad_sample_is_named(tmp_path: Path, record: dict[str, Any], parts: tuple[str, ...]) -> None:
    with pytest.raises(UserError) as caught:
        probe(write_data(tmp_path, tiny.CASES["text"]["record"], record))
    for part in parts:
        assert part in str(caught.value), part


def test_a_sample_too_long_to_be_used_is_an_error(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "why? " * 3000}, {"from": "gpt", "value": "because"}]
    long = {"id": "long", "conversations": turns}
    with pytest.raises(
        UserError, match=r"1 of 2 samples, 1 too long \(> 2048\); the probe needs every sample"
    ):
        probe(write_data(tmp_path, tiny.CASES["text"]["record"], long))


def test_different_tokenizers_and_vocabularies_are_refused_together(tmp_path: Path, text_only: Path) -> None:
    student = copy_model(tmp_path / "student", vocab_size=700)
    (student / "tokenizer.model").write_bytes(b"another")
    with pytest.raises(
        UserError, match=r"different tokenizers .*; vocabulary sizes differ: teacher 600, student 700"
    ):
        probe(text_only, student=student)


def test_a_missing_data_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere.json"):
        probe(tmp_path / "nowhere.json")


@pytest.mark.parametrize("family", ["llava", "gemma3"])
def test_other_families_give_the_values_of_a_float64_reference(tmp_path: Path, family: str) -> None:
    vlm.write_images(tmp_path)
    teacher, student = vlm.folder(family, "teacher"), vlm.folder(family)
    found = probe(
        write_data(tmp_path, *vlm.RECORDS),
        teacher=teacher,
        student=student,
        image_folder=tmp_path,
        template="chat",
        dtype="float64",
    )
    adapters = seeded_adapters(model_facts(teacher), model_facts(student), 0).double()
    theirs, ours = (reference.run_whole(folder, vlm.RECORDS, tmp_path) for folder in (teacher, student))
    for term in ("ce", "reverse_kl", "attention", "vision_all", "vision_focus"):
        expected = 0.0
        for record, one, other in zip(vlm.RECORDS, theirs, ours, strict=True):
            places = reference.find(student, record, tmp_path)
            sums = reference.sums(one, other, places, adapters, vlm.token_count(), 16)
            expected += sums["divergence" if term == "reverse_kl" else term]
        assert found.terms[term] * found.counts[term] == pytest.approx(expected, rel=1e-6), term
        assert found.gradient_norms[term] > 0


def test_a_template_that_the_models_do_not_have_is_refused(text_only: Path) -> None:
    with pytest.raises(UserError, match=r"template = chat: valid for these models: plain, v1"):
        probe(text_only, template="chat")
    with pytest.raises(UserError, match=r"template = v1: valid for these models: chat"):
        probe(text_only, teacher=vlm.folder("llava", "teacher"), student=vlm.folder("llava"))


SETTINGS = {
    "distillation__weights": {"attention": 3.0, "vision": 0.5, "logits": 2.0},
    "distillation__divergence": "forward_kl",
    "distillation__top_k": 2,
    "training__max_steps": 2,
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, one_rank: RankPool) -> Path:
    run = tiny.write_run(tmp_path_factory.mktemp("trained") / "run", 1, **SETTINGS)
    assert [code for code, _ in one_rank.run(go_on, str(run))] == [0]
    return run


def test_a_run_is_probed_with_its_own_configuration(tmp_path: Path) -> None:
    run = tiny.write_run(tmp_path / "run", 1, **SETTINGS)
    result = run_probe_of_run(run, 3)
    assert list(result.terms)[:2] == ["ce", "forward_kl"]
    assert result.counts["vision_focus"] == result.counts["vision_all"] * 2 // 144
    weights = {"ce": 1.0, "forward_kl": 2.0, "attention": 3.0, "vision_all": 0.5, "vision_focus": 0.05}
    assert result.terms["total"] == pytest.approx(
        sum(weight * result.terms[term] for term, weight in weights.items())
    )
    assert result.weights == pytest.approx(weights)
    for term, weight in weights.items():
        together = sum(norm**2 for norm in result.parts[term].values()) ** 0.5
        assert together == pytest.approx(weight * result.gradient_norms[term], rel=1e-4), term
    assert (
        result.parts["attention"]["layer 1 rest"] == 0 < result.parts["attention"]["layer 0 queries and keys"]
    )
    assert run_probe_of_run(run, 1).counts["ce"] < result.counts["ce"]


def test_the_samples_of_a_run_are_those_of_its_first_steps(tmp_path: Path) -> None:
    """Of four samples, in steps of two and in one step: three span two steps, nine are the whole epoch."""
    runs = []
    for size in (2, 4):
        run = tiny.write_run(tmp_path / f"run{size}", 1, **SETTINGS, training__global_batch_size=size)
        for file in (run / "v1.json", run / "plain.json"):
            file.write_text(json.dumps(json.loads(file.read_text())[:2]))
        runs.append(run)
    steps, one_step = runs
    first, second = run_probe_of_run(steps, 2), run_probe_of_run(steps, 3)
    assert second == run_probe_of_run(one_step, 3)
    epoch = run_probe_of_run(steps, 9).counts
    assert first.counts["ce"] < second.counts["ce"] < epoch["ce"]
    assert epoch == run_probe_of_run(one_step, 4).counts


def test_a_run_is_probed_at_its_newest_checkpoint(tmp_path: Path, trained: Path) -> None:
    """Student and adapters of the checkpoint are those that a next stage would start from."""
    carried = {"model__student": str(RunPaths(trained).student), "model__adapters": str(trained)}
    following = tiny.write_run(tmp_path / "following", 1, **SETTINGS, **carried)
    fresh = tiny.write_run(tmp_path / "fresh", 1, **SETTINGS)
    found = run_probe_of_run(trained, 4)
    assert found == run_probe_of_run(following, 4)
    assert found.terms["attention"] != run_probe_of_run(fresh, 4).terms["attention"]


def test_weights_that_a_run_has_moved_are_those_of_its_newest_checkpoint(
    tmp_path: Path, trained: Path
) -> None:
    run = Path(shutil.copytree(trained, tmp_path / "run"))
    manifest = step_folder(run, 2) / "manifest.json"
    moved = {"ce": 1.0, "divergence": 8.0, "attention": 60.0, "vision_all": 0.25, "vision_focus": 0.025}
    base = term_weights(load_run_config(RunPaths(run).config).distillation)
    balance = {"kind": "learned", "base": base, "weights": moved}
    facts = {**json.loads(manifest.read_text()), "balance": balance}
    manifest.write_text(json.dumps(facts))
    manifest.with_name("COMMITTED").write_text("")  # its marker would not fit the manifest any more
    fixed = run_probe_of_run(run, 2)
    tiny.resize_run(run, 1, distillation__balance="learned")
    found = run_probe_of_run(run, 2)
    assert found.weights == {("forward_kl" if term == "divergence" else term): w for term, w in moved.items()}
    factors = {"ce": 1, "forward_kl": 4, "attention": 20, "vision_all": 0.5, "vision_focus": 0.5}
    for term, factor in factors.items():
        assert found.parts[term] == pytest.approx({k: factor * v for k, v in fixed.parts[term].items()})
    total = sum(weight * found.terms[term] for term, weight in found.weights.items())
    assert found.terms["total"] == pytest.approx(total)


def test_a_run_without_terms_of_a_teacher_cannot_be_probed(tmp_path: Path) -> None:
    run = tiny.write_run(tmp_path / "run", 1, distillation__enabled=False)
    with pytest.raises(UserError, match="trains without a teacher"):
        run_probe_of_run(run, 1)
    with pytest.raises(UserError, match="not a run folder"):
        run_probe_of_run(tmp_path, 1)
