from alignkd.config.describe import all_keys, describe, find_field, nearest, siblings

ISSUED_KEYS = {
    "model.teacher",
    "model.student",
    "training.learning_rate",
    "training.projector_learning_rate",
    "training.adapter_learning_rate",
    "training.micro_batch_size",
    "training.global_batch_size",
    "training.precision",
    "student.zero_stage",
    "teacher.placement",
    "distillation.enabled",
    "distillation.weights.attention",
    "distillation.weights.vision",
    "distillation.weights.logits",
    "distillation.vision_focus_weight",
    "distillation.top_k",
    "distillation.temperature",
    "distillation.divergence",
    "distillation.attention_rows",
    "distillation.logit_positions",
    "checkpoint.every",
}


def test_documented_keys_exist() -> None:
    assert {key.name for key in all_keys()} >= ISSUED_KEYS


def test_a_list_of_words_is_described_by_its_words() -> None:
    field = find_field(("student", "train", 1))
    assert field is not None
    assert describe(field).startswith("a list of projector, language_model or null (parts that are trained")


def test_nearest_prefers_the_same_name_elsewhere_then_similar_names_nearby() -> None:
    assert [key.name for key in nearest(("learning_rate",))] == ["training.learning_rate"]
    assert [key.name for key in nearest(("precision",))] == ["training.precision", "teacher.precision"]
    assert [key.name for key in nearest(("distillation", "topk"))] == ["distillation.top_k"]
    assert [key.name for key in nearest(("distilation",))] == ["distillation"]
    assert [key.name for key in nearest(("model", "zero_stages"))] == ["student.zero_stage"]
    assert nearest(("xyzzy",)) == []


def test_fields_are_found_through_lists() -> None:
    field = find_field(("data", "sources", 4, "template"))
    assert field is not None
    assert field.default == "v1"
    assert find_field(("data", "nothing")) is None
    assert "file" in siblings(("data", "sources", 4, "nothing"))
