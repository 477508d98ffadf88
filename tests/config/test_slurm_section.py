"""Secrets belong in the environment of the submitting shell, not in files; names that programs understand."""

import pytest
from pydantic import ValidationError

from alignkd.config.slurm_section import SlurmSection


@pytest.mark.parametrize(
    "name",
    [
        *(
            "HF_TOKEN",
            "WANDB_API_KEY",
            "WANDB_KEY",
            "HF_AUTH",
            "DB_PASSWD",
            "DB_PASS",
            "AWS_SECRET_ACCESS_KEY",
        ),
        *("GITHUBTOKEN", "MY_PASSWORD", "AZURE_CREDENTIALS", "my_token"),
    ],
)
def test_a_secret_is_refused_wherever_it_would_be_written(name: str) -> None:
    for values in (
        {"export": {name: "x"}},
        {"activate": f"source venv/bin/activate; export {name}=x"},
        {"activate": f"{name}='x' . setup.sh"},
        {"sbatch_options": {"export": f"ALL,{name}=x"}},
        {"srun_options": {"export": f"{name}=x,ALL"}},
    ):
        with pytest.raises(ValidationError, match=f"{name} looks like a secret.*slurm.secrets"):
            SlurmSection.model_validate(values)


@pytest.mark.parametrize(
    "values",
    [
        {"export": {"NCCL_DEBUG": "INFO", "TOKENIZERS_PARALLELISM": "false", "NCCL_IB_PKEY": "1"}},
        {"export": {"MONKEY": "x", "AUTHOR": "x", "COMPASS": "x"}},
        {"activate": "export HF_TOKEN=$(cat ~/.token)"},
        {"activate": 'export HF_TOKEN="$MY_TOKEN"; source /x/activate'},
        {"activate": "export HF_TOKEN; source /x/activate"},
        {"sbatch_options": {"export": "ALL,HF_TOKEN", "licenses": "key=x"}},
        {"sbatch_options": {"export": "NONE", "exclusive": True}},
        {"secrets": ["HF_TOKEN", "WANDB_KEY"]},
    ],
)
def test_names_and_references_are_no_secrets(values: dict[str, object]) -> None:
    SlurmSection.model_validate(values)


@pytest.mark.parametrize(
    "values",
    [
        {"network_interface": "^docker0"},  # all but this one, for NCCL
        {"network_interface": "eth 0"},
        {"network_interface": ""},
        {"python": "venv/bin/python"},  # relative to which folder?
        {"python": "~/venv/bin/python"},
    ],
)
def test_what_a_node_would_not_understand_is_refused(values: dict[str, object]) -> None:
    with pytest.raises(ValidationError, match=next(iter(values))):
        SlurmSection.model_validate(values)


@pytest.mark.parametrize(
    "values",
    [
        *({"network_interface": name} for name in ("ib0", "=ib0", "ib0,ib1", "eth0.100")),
        *({"python": name} for name in ("/opt/a b/bin/python", "python3")),
    ],
)
def test_exact_interfaces_and_interpreters_are_accepted(values: dict[str, object]) -> None:
    SlurmSection.model_validate(values)
