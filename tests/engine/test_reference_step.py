"""A whole optimizer step, from a run's YAML to its gradients, equals an independent one in float64.

The run folder is read, its data are loaded, and its models are built as in training; then the models are
widened to float64, and DeepSpeed's engine is replaced by one that only calls backward. The other side is
``tests.engine.reference``. Weights, lambda, K and temperature differ from their defaults, and each choice
does in some case, so that a key that is ignored shows.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from alignkd.distributed.ranks import Ranks
from alignkd.engine.optimizer_step import all_reduce_step_info, run_optimizer_step
from alignkd.engine.setup import prepare
from alignkd.engine.signals import StopRequest
from alignkd.engine.stopwatch import Stopwatch
from alignkd.losses.total import TERMS
from alignkd.run_folder.progress import Progress
from tests import tiny
from tests.engine.plain_engine import PlainEngine, ResidentTeacher
from tests.engine.reference.models import Model
from tests.engine.reference.samples import read_sample
from tests.engine.reference.step import Settings, step
from tests.ranks import RankPool

# What the product calls a parameter, and what the published files call it.
NAMES = {
    "student.head.": "lm_head.",
    "student.language_model.": "model.",
    "student.projector.": "model.mm_projector.",
    "adapters.": "",
}
TWO_IMAGES = {
    "id": "two",
    "image": ["image_2.png", "image_0.png"],
    "conversations": [
        {"from": "human", "value": "Is <image> like <image> or not?"},
        {"from": "gpt", "value": "Not at all."},
    ],
}
V1 = [*(tiny.CASES[name]["record"] for name in ("v1", "rounds", "text")), TWO_IMAGES]

CASES: dict[str, dict[str, Any]] = {
    "packed, reverse KL": {
        "distillation__weights": {"attention": 900.0, "vision": 3.0, "logits": 0.7},
        "distillation__vision_focus_weight": 0.37,
        "distillation__top_k": 5,
        "distillation__temperature": 1.7,
        "distillation__divergence": "reverse_kl",
        "distillation__attention_rows": "prompt_only",
        "distillation__logit_positions": "all_text",
    },
    "padded, Jensen-Shannon, no look-ahead": {
        "training__packing": False,
        "teacher__lookahead": 1,
        "distillation__weights": {"attention": 40.0, "vision": 0.2, "logits": 5.0},
        "distillation__vision_focus_weight": 2.5,
        "distillation__top_k": 9,
        "distillation__temperature": 0.8,
        "distillation__divergence": "js",
        "distillation__attention_rows": "all_text",
        "distillation__logit_positions": "supervised",
        "distillation__share_vision_tower": False,
    },
    "token budget, forward KL, checkpointed": {
        "training__tokens_per_micro_batch": 500,
        "training__gradient_checkpointing": True,
        "teacher__lookahead": 2,
        "distillation__weights": {"attention": 300.0, "vision": 1.3, "logits": 0.4},
        "distillation__vision_focus_weight": 0.6,
        "distillation__top_k": 143,
        "distillation__temperature": 3.0,
        "distillation__divergence": "forward_kl",
        "distillation__attention_rows": "all_text",
        "distillation__logit_positions": "all_text",
    },
}


class Float64Engine(PlainEngine):
    """With the run's own accumulation."""

    def __init__(self, engine: Any) -> None:
        super().__init__(engine.module.double())
        self._accumulation = engine.gradient_accumulation_steps()

    def gradient_accumulation_steps(self) -> int:
        return int(self._accumulation)


def product_step(ranks: Ranks, run: str) -> dict[str, Any]:
    """The first step of ``run``: loss, sums, gradients, and the adapters that it began with."""
    job = prepare(Path(run), ranks, Progress(Path(run), writes=False))
    assert job.teacher is not None
    engine = Float64Engine(job.engine)
    teacher = ResidentTeacher(job.teacher.model.double())
    with job.loader:
        window = next(iter(job.loader))
    info = all_reduce_step_info(window, engine.module.sizes(), StopRequest(), ranks)
    sums = run_optimizer_step(
        engine,
        teacher,
        window,
        info,
        job.config.distillation,
        ranks,
        Stopwatch(),
        job.config.teacher.lookahead,
    )
    named = dict(engine.module.named_parameters())
    return {
        # DeepSpeed divides by ranks and accumulation in backward.
        "loss": sum(loss.item() for loss in engine.losses) / engine.gradient_accumulation_steps(),
        "means": {
            term: float(value) / info.elements[term]
            for term, value in zip(TERMS, sums.terms.tolist(), strict=True)
        },
        "gradients": {
            name: parameter.grad / engine.gradient_accumulation_steps()
            for name, parameter in named.items()
            if parameter.grad is not None
        },
        "trained": [name for name, parameter in named.items() if parameter.requires_grad],
        "adapters": {name: value.detach() for name, value in engine.module.adapters.state_dict().items()},
        "micro_batches": len(window),
    }


def write_run(folder: Path, changes: dict[str, Any]) -> tuple[Path, list[tuple[str, dict[str, Any]]]]:
    """A run of one step that takes every record, and these records with their templates."""
    plain = [tiny.CASES["plain"]["record"]]
    records = [("v1", record) for record in V1]
    if changes["distillation__attention_rows"] != "prompt_only":  # which `plain` does not have
        records += [("plain", record) for record in plain]
    sources = [
        {"file": str(folder / f"{template}.json"), "template": template, "image_folder": str(tiny.FOLDER)}
        for template in dict.fromkeys(template for template, _ in records)
    ]
    run = tiny.write_run(
        folder,
        1,
        data__sources=sources,
        training__global_batch_size=8,
        training__micro_batch_size=2,
        training__max_gradient_norm=0.0,
        training__seed=11,
        student__zero_stage=0,
        teacher__placement="replicated",
        **changes,
    )
    (run / "v1.json").write_text(json.dumps(V1))
    (run / "plain.json").write_text(json.dumps(plain))
    return run, records


@pytest.mark.parametrize("case", list(CASES))
def test_a_step_has_the_loss_and_the_gradients_of_an_independent_one(
    one_rank: RankPool, tmp_path: Path, case: str
) -> None:
    run, records = write_run(tmp_path / "run", CASES[case])
    (found,) = one_rank.run(product_step, str(run))
    assert found["micro_batches"] > 1

    student, teacher = Model(tiny.STUDENT), Model(tiny.TEACHER)
    for name, weight in student.weights.items():
        weight.requires_grad_("vision_tower" not in name)
    adapters = {name: weight.requires_grad_() for name, weight in found["adapters"].items()}
    samples = [read_sample(record, template, tiny.FOLDER, tiny.STUDENT) for template, record in records]
    changes = {key.removeprefix("distillation__"): value for key, value in CASES[case].items()}
    settings = Settings(
        **changes["weights"],
        focus=changes["vision_focus_weight"],
        **{
            key: changes[key]
            for key in ("top_k", "temperature", "divergence", "attention_rows", "logit_positions")
        },
    )
    loss, means = step(samples, teacher, student, adapters, settings)

    assert found["means"] == pytest.approx(means, rel=1e-6)
    assert found["loss"] == pytest.approx(loss, rel=1e-6)
    expected = {name: weight.grad for name, weight in {**student.weights, **adapters}.items()}
    assert found["gradients"].keys() == set(found["trained"])
    for name, gradient in found["gradients"].items():
        prefix = next(prefix for prefix in NAMES if name.startswith(prefix))
        other = expected.pop(name.replace(prefix, NAMES[prefix], 1))
        assert other is not None, name
        scale = float(other.abs().max())
        assert scale > 0, name
        torch.testing.assert_close(gradient, other, rtol=0, atol=1e-5 * scale, msg=name)
    assert [name for name, gradient in expected.items() if gradient is not None] == []
