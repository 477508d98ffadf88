"""What is compared: the student alone, and the student with one thing about its teacher changed at a time.

The order is that of the sweep: what says most comes first.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any

from alignkd.config.schema import DistillationSection


@dataclass(frozen=True)
class Condition:
    name: str
    about: str
    distillation: dict[str, Any] | None = None  # the section's keys; None: no teacher
    steps: float = 1.0  # times the baseline's
    frozen_adapters: bool = False
    attention: str | None = None  # one of ``patches.VARIANTS``
    labels_only: tuple[str, ...] = field(default=())  # kinds of question without a term of the teacher
    clip: float = 1.0  # largest gradient norm; 0: none
    balance_every: int | None = None  # steps between measurements that the weights follow
    better_teacher: bool = False  # ``models.train_better_teacher``

    def section(self) -> DistillationSection:
        return DistillationSection.model_validate(self.distillation or {"enabled": False})

    def as_dict(self) -> dict[str, Any]:
        """What a record must have been made with. ``better_teacher`` is left out where it is false: the first
        records are older."""
        values = asdict(self) | {"labels_only": list(self.labels_only)}
        left_out = ("about",) if self.better_teacher else ("about", "better_teacher")
        return {key: value for key, value in values.items() if key not in left_out}


BASELINE = "alone"
TOP_K = 4  # of 16 vision tokens, as in the demo


def _with(
    name: str, about: str, weights: tuple[float, float, float] = (1.0, 1.0, 1.0), **keys: Any
) -> Condition:
    """``weights`` of L_A, L_V and the logit term."""
    names = ("attention", "vision", "logits")
    return Condition(name, about, {"top_k": TOP_K, "weights": dict(zip(names, weights, strict=True)), **keys})


_ALL = _with("all", "all terms, unit weights, lambda 0.1")
_HARD = ("column", "row", "count", "largest", "two_images", "text")

_EACH = [
    _ALL,
    _with("logits", "reverse KL only", (0, 0, 1)),
    _with("attention", "L_A only", (1, 0, 0)),
    _with("vision", "L_V only", (0, 1, 0)),
]

_LIST = [
    Condition(BASELINE, "labels only"),
    *_EACH,
    Condition("alone, twice the steps", "labels only, at more than the cost of a teacher", steps=2.0),
    *(
        replace(
            one,
            name=f"{one.name}, better teacher",
            about=f"{one.about}; a better teacher",
            better_teacher=True,
        )
        for one in _EACH
    ),
    replace(_ALL, name="labels on sums", about="sums without the teacher", labels_only=("text",)),
    replace(_ALL, name="labels on hard kinds", about="the teacher on positions only", labels_only=_HARD),
    replace(_ALL, name="no clipping", about="all terms, gradients of any norm", clip=0.0),
    Condition("alone, no clipping", "labels only, gradients of any norm", clip=0.0),
    replace(
        _ALL,
        name="no clipping, better teacher",
        about="all terms, gradients of any norm; a better teacher",
        clip=0.0,
        better_teacher=True,
    ),
    replace(_ALL, name="frozen adapters", about="defect: adapters stay random", frozen_adapters=True),
    replace(
        _ALL, name="transposed attention", about="defect: image queries, text keys", attention="transposed"
    ),
    replace(_ALL, name="text-text attention", about="text keys in L_A", attention="text-text"),
    replace(_ALL, name="last layer", about="L_A on the last layer", attention="last layer"),
    replace(_ALL, name="balanced", about="weights by gradient norms", balance_every=50),
    _with("learned weights", "all terms, weights by learned uncertainty", balance="learned"),
    _with("forward KL", "all terms, KL(teacher || student)", divergence="forward_kl"),
    _with("temperature 2", "all terms", temperature=2.0),
    _with("temperature 4", "all terms", temperature=4.0),
    *(
        _with(f"attention x {weight:g}", "L_A only, another weight", (weight, 0, 0))
        for weight in (1e-2, 1e-1, 1e1, 1e2, 1e3, 1e4)
    ),
    replace(_with("attention, row KL", "L_A only, as KL of rows", (1, 0, 0)), attention="row KL"),
    *(_with(f"K {count}", "all terms", top_k=count) for count in (1, 2, 8)),
    *(_with(f"lambda {weight:g}", "all terms", vision_focus_weight=weight) for weight in (0.0, 1.0, 10.0)),
]
CONDITIONS: dict[str, Condition] = {condition.name: condition for condition in _LIST}
assert len(CONDITIONS) == len(_LIST), "names are unique"
