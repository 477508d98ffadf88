import torch
from safetensors.torch import load_file

from alignkd.config.schema import ModelSection
from alignkd.data.sample_task import folders
from alignkd.data.sample_task.tokenizer import train_tokenizer
from alignkd.models.building import BuildOptions
from alignkd.models.configuration import read_model_config
from alignkd.models.loading import load_student


def write_all(out, seed=0):
    tokenizer = train_tokenizer()
    folders.write_model_folder(out / "teacher", folders.TEACHER_CONFIG, tokenizer)
    folders.write_model_folder(out / "student", folders.STUDENT_CONFIG, tokenizer)
    folders.write_tower_folder(out / folders.TOWER, seed)


def test_model_folders_are_read_with_the_tower_beside_them(tmp_path):
    write_all(tmp_path)
    for name in ("teacher", "student"):
        config = read_model_config(tmp_path / name)
        assert config.vision_tokens == 16
        assert config.tower_config["num_hidden_layers"] == folders.TOWER_LAYERS
        assert config.preprocessor_config["crop_size"] == {"height": 32, "width": 32}


def test_model_from_scratch_takes_every_tensor_of_the_tower(tmp_path):
    write_all(tmp_path)
    section = ModelSection(
        student="scratch",
        student_config=str(tmp_path / "teacher"),
        vision_tower=str(tmp_path / folders.TOWER),
    )
    model, _ = load_student(section, seed=0, options=BuildOptions(torch.float32))
    written = load_file(tmp_path / folders.TOWER / "model.safetensors")
    loaded = {f"vision_model.{name}": value for name, value in model.vision_tower.named_parameters()}
    assert loaded.keys() == written.keys()
    for name, value in written.items():
        assert torch.equal(loaded[name], value), name


def test_tower_weights_follow_the_seed(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        folders.write_tower_folder(tmp_path / name, seed)
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in "abc"]
    assert files[0] == files[1]
    assert files[0] != files[2]


def test_student_is_smaller_than_the_teacher():
    for key in ("hidden_size", "num_hidden_layers", "num_attention_heads"):
        assert folders.STUDENT_CONFIG[key] < folders.TEACHER_CONFIG[key]
