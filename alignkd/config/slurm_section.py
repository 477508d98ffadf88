"""The section ``slurm`` of ``alignkd.yaml``."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from alignkd.config.section import PositiveInt, Section

SlurmText = Annotated[str, Field(min_length=1, max_length=1000, pattern=r"^[^\x00-\x1f\x7f]+$")]
VariableName = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]


_SECRET_WORDS = (
    *("APIKEY", "AUTH", "CREDENTIAL", "CREDENTIALS", "KEY", "PASS", "PASSPHRASE", "PASSWD", "PASSWORD"),
    *("PWD", "SECRET", "TOKEN"),
)
# NAME=VALUE in a shell command or an --export list. A value that begins with $ or ` is read when a job runs.
_ASSIGNMENT = re.compile(r"""(?:^|[\s;,&|(])([A-Za-z_]\w*)=["']?(?![$`"'\s;,]|$)""")


def _open_name(name: str) -> str:
    words = name.upper().split("_")
    if any(word in _SECRET_WORDS or word.endswith(("TOKEN", "SECRET", "PASSWORD")) for word in words):
        raise ValueError(
            f"{name} looks like a secret, which must not be written to a file; list its name in slurm.secrets"
        )
    return name


def _open_text(text: str) -> str:
    """Refuse ``export WANDB_API_KEY=abc``, but not ``export WANDB_API_KEY=$(cat ~/.wandb)``."""
    for name in _ASSIGNMENT.findall(text):
        _open_name(name)
    return text


def _open_options(options: dict[str, Any]) -> dict[str, Any]:
    for name, value in options.items():
        if name.startswith("export") and isinstance(value, str):
            _open_text(value)
    return options


OpenName = Annotated[VariableName, AfterValidator(_open_name)]
OptionName = Annotated[str, Field(pattern=r"^[a-z][a-z0-9-]*$")]


Options = Annotated[dict[OptionName, SlurmText | int | bool], AfterValidator(_open_options)]


class ContainerSection(Section):
    """Only the ranks run in the container; the job script, which saves and requeues, stays outside."""

    kind: Literal["none", "pyxis", "apptainer"] = "none"
    image: SlurmText | None = Field(None, description="image, in the form that pyxis or apptainer takes")
    mounts: list[SlurmText] = Field(
        default_factory=list, description="SOURCE:TARGET of every mount: run folder, data, models"
    )
    python: SlurmText = Field(
        "python3", description="Python interpreter in the container, with alignkd installed"
    )


class SlurmSection(Section):
    """Site-specific job settings; also read from ``~/.config/alignkd/site.yaml``."""

    account: SlurmText | None = None
    partition: SlurmText | None = None
    qos: SlurmText | None = None
    constraint: SlurmText | None = None
    reservation: SlurmText | None = None
    nodelist: SlurmText | None = None
    exclude: SlurmText | None = Field(None, description="nodes to avoid")
    gpu_option: Literal["gpus-per-node", "gres", "none"] = Field(
        "gpus-per-node", description="how this site requests GPUs; `none` trains on CPUs (gloo)"
    )
    gpu_type: SlurmText | None = Field(None, description="GPU type: a100 requests gpu:a100:N")
    gpus_per_node: PositiveInt | None = Field(
        None, description="GPUs of a node of this cluster: the default of --gpus-per-node"
    )
    gpu_memory: str | None = Field(
        None,
        pattern=r"^\d+(\.\d+)?[MGT]$",
        description="memory of one GPU, such as 80G; lets launch refuse runs that cannot fit",
    )
    cpus_per_task: PositiveInt | None = Field(None, description="CPUs per rank")
    memory: str | None = Field(
        None, pattern=r"^\d+[KMGT]?$", description="host memory per node; 0 requests all of it"
    )
    exclusive: bool = False
    time_limit: str | None = Field(
        None,
        pattern=r"^(\d+-)?\d+(:\d{1,2}){0,2}$",
        description="[days-]hours:minutes:seconds, as Slurm writes it",
    )
    signal_seconds: int = Field(
        300,
        ge=10,
        le=65535,
        description="seconds between SIGUSR1 and the time limit; must be enough for a step and a save",
    )
    requeue: bool = Field(
        True, description="false submits a dependent job instead, for sites that do not allow requeueing"
    )
    max_restarts: int = Field(3, ge=0, le=1000, description="consecutive restarts without a new checkpoint")
    mail_user: SlurmText | None = None
    mail_type: list[SlurmText] = Field(default_factory=list, description="BEGIN, END, FAIL, REQUEUE, ...")
    modules: list[SlurmText] = Field(default_factory=list, description="`module load` of these, in order")
    activate: Annotated[SlurmText, AfterValidator(_open_text)] | None = Field(
        None, description="shell command that activates the environment"
    )
    export: dict[OpenName, SlurmText] = Field(
        default_factory=dict,
        description="environment variables of the ranks (NCCL_..., proxies); secrets belong in `secrets`",
    )
    secrets: list[VariableName] = Field(
        default_factory=list,
        description="names of environment variables that must be set at submission; "
        "their values are never written",
    )
    python: SlurmText | None = Field(
        None,
        pattern=r"^(/.*|[^/]+)$",
        description="Python interpreter on the nodes: an absolute path, or a name that `modules` and "
        "`activate` put on PATH; default: the one that submits",
    )
    network_interface: str | None = Field(
        None,
        pattern=r"^=?[A-Za-z0-9_.:-]+(,[A-Za-z0-9_.:-]+)*$",
        description="interface for NCCL and gloo, by its exact name (`ip link`), as gloo takes neither "
        "prefixes nor ^; for NCCL alone: NCCL_SOCKET_IFNAME in `export`; default: their own choice",
    )
    container: ContainerSection = Field(default_factory=ContainerSection)
    sbatch_options: Options = Field(
        default_factory=dict,
        description="other sbatch options, without the dashes; they override ours, and `false` removes one",
    )
    srun_options: Options = Field(
        default_factory=dict, description="other srun options, as in sbatch_options"
    )


def time_limit_seconds(text: str) -> int:
    """Seconds of a Slurm time limit: m, m:s, h:m:s or days-h[:m[:s]]."""
    days, dash, rest = text.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if dash:
        hours, minutes, seconds = [*parts, 0, 0][:3]
    elif len(parts) == 3:
        hours, minutes, seconds = parts
    else:
        hours, (minutes, seconds) = 0, [*parts, 0][:2]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds
