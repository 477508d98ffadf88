import pytest

from alignkd.config import load_config
from alignkd.errors import ConfigError
from launcher.run.site import read_site, site_path


def put(folder, text: str) -> dict[str, str]:
    environment = {"XDG_CONFIG_HOME": str(folder / "xdg"), "HOME": "/nowhere"}
    path = site_path(environment)
    path.parent.mkdir(parents=True)
    path.write_text(text)
    return environment


def test_a_missing_or_empty_profile_sets_nothing(tmp_path) -> None:
    assert str(site_path({"HOME": "/home/me"})) == "/home/me/.config/alignkd/site.yaml"
    assert read_site({"HOME": str(tmp_path)}) == {}
    assert read_site(put(tmp_path, "# nothing\n")) == {}


def test_the_configuration_and_its_stage_override_the_profile(tmp_path, config_file) -> None:
    site = read_site(put(tmp_path, "slurm: {partition: site, qos: site, account: site}\n"))
    config_file.write_text(
        config_file.read_text().replace("slurm: {", "slurm: {qos: file, account: file, ")
        + "stages: {a: {slurm: {account: stage}}}\n"
    )
    slurm = load_config(config_file, ["slurm.memory=4G"], "a", site).slurm
    assert (slurm.partition, slurm.qos, slurm.account, slurm.memory) == ("site", "file", "stage", "4G")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("slurm: {partion: x}", "slurm.partion: unknown key; did you mean partition?"),
        ("slurm: {signal_seconds: 1}", "slurm.signal_seconds: "),
        ("partition: x", "one section: `slurm"),
        ("[]", "one section"),
        ("slurm: {export: {HF_TOKEN: x}}", "slurm.export"),
    ],
)
def test_every_problem_of_a_profile_is_an_error(tmp_path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=r"site\.yaml") as caught:
        read_site(put(tmp_path, text))
    assert message in str(caught.value)
