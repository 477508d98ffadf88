"""The section ``slurm`` of ``alignkd.yaml``."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from alignkd.config.section import PositiveInt, Section

SlurmText = Annotated[str, Field(min_length=1, max_length=1000, pattern=r"^[^\x00-\x1f\x7f]+$")]
VariableName = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]


def _open_name(name: str) -> str:
    if any(
        word in name.upper() for word in ("TOKEN", "SECRET", "PASSWORD", "API_KEY", "APIKEY", "CREDENTIAL")
    ):
        raise ValueError(f"{name} looks like a secret, which is never written down; name it in slurm.secrets")
    return name


OpenName = Annotated[VariableName, AfterValidator(_open_name)]
OptionName = Annotated[str, Field(pattern=r"^[a-z][a-z0-9-]*$")]


class ContainerSection(Section):
    """The life cycle (saving, requeueing) stays outside; only the ranks run in the container."""

    kind: Literal["none", "pyxis", "apptainer"] = "none"
    image: SlurmText | None = Field(None, description="what pyxis or apptainer takes as an image")
    mounts: list[SlurmText] = Field(
        default_factory=list, description="SOURCE:TARGET; the run folder, data, models"
    )
    python: SlurmText = Field("python3", description="interpreter inside, with alignkd installed")


class SlurmSection(Section):
    """What a site wants of a job; also read from ``~/.config/alignkd/site.yaml``."""

    account: SlurmText | None = None
    partition: SlurmText | None = None
    qos: SlurmText | None = None
    constraint: SlurmText | None = None
    reservation: SlurmText | None = None
    nodelist: SlurmText | None = None
    exclude: SlurmText | None = Field(None, description="nodes to stay away from")
    gpu_option: Literal["gpus-per-node", "gres", "none"] = Field(
        "gpus-per-node", description="how this site asks for GPUs; `none` trains on CPUs (gloo)"
    )
    gpu_type: SlurmText | None = Field(None, description="a100, say: asks for gpu:a100:N")
    gpu_memory: str | None = Field(
        None,
        pattern=r"^\d+(\.\d+)?[MGT]$",
        description="of one GPU, 80G say; lets launch refuse what cannot fit",
    )
    cpus_per_task: PositiveInt | None = Field(None, description="CPUs per rank")
    memory: str | None = Field(None, pattern=r"^\d+[KMGT]?$", description="per node; 0 takes all")
    exclusive: bool = False
    time_limit: str | None = Field(
        None,
        pattern=r"^(\d+-)?\d+(:\d{1,2}){0,2}$",
        description="[days-]hours:minutes:seconds, as Slurm writes it",
    )
    signal_seconds: int = Field(
        300, ge=10, le=65535, description="lead of SIGUSR1 before the time limit: a step and a save must fit"
    )
    requeue: bool = Field(
        True, description="false where jobs may not be requeued: a chained job follows instead"
    )
    max_restarts: int = Field(3, ge=0, le=1000, description="restarts without a new checkpoint in between")
    mail_user: SlurmText | None = None
    mail_type: list[SlurmText] = Field(default_factory=list, description="BEGIN, END, FAIL, REQUEUE, ...")
    modules: list[SlurmText] = Field(default_factory=list, description="`module load` of these, in order")
    activate: SlurmText | None = Field(None, description="shell line that makes the environment ready")
    export: dict[OpenName, SlurmText] = Field(
        default_factory=dict,
        description="variables for the ranks (NCCL_..., proxies); secrets go to `secrets`",
    )
    secrets: list[VariableName] = Field(
        default_factory=list,
        description="names of variables that the submitting shell must have; never written",
    )
    network_interface: SlurmText | None = Field(None, description="for NCCL and gloo; default: they choose")
    container: ContainerSection = Field(default_factory=ContainerSection)
    sbatch_options: dict[OptionName, SlurmText | int | bool] = Field(
        default_factory=dict,
        description="any other option of sbatch, without the dashes; wins over ours, `false` removes one",
    )
    srun_options: dict[OptionName, SlurmText | int | bool] = Field(
        default_factory=dict, description="the same for srun"
    )
