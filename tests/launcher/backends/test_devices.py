import pytest

from launcher.backends import devices
from launcher.backends.devices import visible_gpus


@pytest.fixture
def driver(tmp_path, monkeypatch):
    """Install a fake nvidia-smi that lists ``count`` GPUs."""

    def install(count: int) -> None:
        program = tmp_path / "nvidia-smi"
        program.write_text(
            "#!/bin/sh\n" + "".join(f'echo "GPU {n}: X (UUID: GPU-{n})"\n' for n in range(count))
        )
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")

    return install


@pytest.mark.parametrize(
    ("count", "chosen", "expected"),
    [
        (2, None, ["0", "1"]),
        (4, "3,1", ["3", "1"]),
        (4, "", []),
        (4, "-1", []),
        (2, "0,7,1", ["0"]),
        (2, "GPU-1", ["GPU-1"]),
        (0, "0", []),
    ],
)
def test_only_gpus_that_the_user_left_visible_are_used(driver, count, chosen, expected) -> None:
    driver(count)
    assert visible_gpus({} if chosen is None else {"CUDA_VISIBLE_DEVICES": chosen}) == expected


def test_without_nvidia_smi_device_files_are_counted(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(devices, "_driver_count", lambda environment: None)
    for name in ("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm"):
        (tmp_path / name).write_text("")
    assert visible_gpus({}, dev=tmp_path) == ["0", "1"]
    assert visible_gpus({}, dev=tmp_path / "none") == []
