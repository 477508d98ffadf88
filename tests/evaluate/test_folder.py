import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from alignkd.errors import UserError
from alignkd.evaluate.__main__ import app
from alignkd.evaluate.folder import evaluate_folder

FIXTURE = Path(__file__).parent.parent / "fixtures" / "mobilevlm_v2_tiny"
MODEL = FIXTURE / "student"
QUESTIONS = [("image_0.png", "What is this?"), ("image_1.png", "Which colour?"), (None, "Say something.")]


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def write_questions(folder, answers):
    records = []
    for number, ((image, text), answer) in enumerate(zip(QUESTIONS, answers, strict=True)):
        value = f"<image>\n{text}" if image else text
        turns = [{"from": "human", "value": value}, {"from": "gpt", "value": answer}]
        record = {"id": number, "kind": "seen" if image else "blind", "conversations": turns}
        records.append({**record, "image": image} if image else record)
    path = folder / "test.json"
    path.write_text(json.dumps(records))
    return path


@pytest.fixture(scope="module")
def model_answers():
    """What the fixture's model says to each question, found without the code under test's batching."""
    from alignkd.data.batch import IGNORE_INDEX
    from alignkd.data.collate import CollateSettings, Example, collate
    from alignkd.data.images import ImageProcessor
    from alignkd.data.records import Turn
    from alignkd.data.templates import encode_prompt
    from alignkd.data.tokenizer import SentencePieceTokenizer
    from alignkd.evaluate.decoding import greedy_decode
    from alignkd.models.building import BuildOptions
    from alignkd.models.loading import load_model

    model = load_model(MODEL, BuildOptions(torch.float32)).eval()
    tokenizer = SentencePieceTokenizer.from_folder(MODEL)
    processor = ImageProcessor(model.config.preprocessor_config, 10**8)
    answers = []
    for image, text in QUESTIONS:
        ids = encode_prompt([Turn("human", f"<image>\n{text}" if image else text)], "v1", tokenizer)
        images = (processor.read(FIXTURE, image, "pad"),) if image else ()
        example = Example(ids, [IGNORE_INDEX] * len(ids), images)
        batch = collate([example], CollateSettings(model.config.vision_tokens, processor.shape))
        answers.append(tokenizer.decode(greedy_decode(model, batch, tokenizer.eos_id, 8)[0]))
    assert all(answer.strip() for answer in answers)
    return answers


def test_answers_that_the_model_gives_count_as_right(tmp_path, model_answers):
    calls = []
    accuracy = evaluate_folder(
        MODEL,
        write_questions(tmp_path, model_answers),
        FIXTURE,
        max_new_tokens=8,
        progress=lambda done, total: calls.append((done, total)),
    )
    assert accuracy.overall.accuracy == 1.0
    assert {kind: row.count for kind, row in accuracy.kinds.items()} == {"seen": 2, "blind": 1}
    assert calls[-1] == (3, 3)


def test_other_answers_count_as_wrong(tmp_path, model_answers):
    wrong = [model_answers[0], "certainly not", "neither"]
    accuracy = evaluate_folder(MODEL, write_questions(tmp_path, wrong), FIXTURE, max_new_tokens=8)
    assert accuracy.kinds["seen"].accuracy == 0.5
    assert accuracy.kinds["blind"].accuracy == 0.0


def test_command_prints_a_table_and_writes_json(tmp_path):
    data = write_questions(tmp_path, ["a", "b", "c"])
    arguments = [str(MODEL), "--data", str(data), "--image-folder", str(FIXTURE)]
    result = CliRunner().invoke(app, [*arguments, "--out", str(tmp_path / "accuracy.json")])
    assert result.exit_code == 0, result.output
    assert "majority baseline" in result.stdout
    written = json.loads((tmp_path / "accuracy.json").read_text())
    assert written["overall"]["count"] == 3
    assert written["kinds"]["seen"] == {"accuracy": 0.0, "baseline": 0.5, "count": 2}
    # What was measured is shown, though the file cannot be written.
    as_json = CliRunner().invoke(app, [*arguments, "--json", "--out", str(tmp_path / "no" / "x.json")])
    assert json.loads(as_json.stdout) == written
    assert as_json.exit_code == 2
    assert "--out" in as_json.stderr
    assert "Traceback" not in as_json.output


@pytest.mark.parametrize(
    ("content", "image_folder", "message"),
    [
        ("[", FIXTURE, "cannot be read as JSON"),
        ("[]", FIXTURE, "at least one record"),
        ('[{"id": 1}]', FIXTURE, "conversation"),
        (None, None, "--image-folder"),
        (None, FIXTURE / "student", "image_0.png"),
    ],
)
def test_unusable_input_is_one_clear_error(tmp_path, content, image_folder, message):
    data = write_questions(tmp_path, ["a", "b", "c"])
    if content is not None:
        data.write_text(content)
    with pytest.raises(UserError, match=message):
        evaluate_folder(MODEL, data, image_folder)


def test_command_shows_an_error_without_a_traceback(tmp_path):
    result = CliRunner().invoke(app, [str(MODEL), "--data", str(tmp_path / "missing.json")])
    assert result.exit_code == 2
    assert "missing.json" in result.stderr
    assert "Traceback" not in result.output
