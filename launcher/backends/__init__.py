"""Back ends by name. Each is imported when it is asked for: most commands need one of them.

`alignkd status` asks them for live jobs, so they import configurations and progress bars where they use them.
"""

from __future__ import annotations

from pathlib import Path

from launcher.backends.base import Backend, BackendChoice


def backend_named(name: str) -> Backend:
    """Raises UserError for an unknown name (a manifest may have been written by another version)."""
    if name == "local":
        from launcher.backends.local import LocalBackend

        return LocalBackend()
    if name == "ssh":
        from launcher.backends.ssh import SshBackend

        return SshBackend()
    if name == "slurm":
        from launcher.backends.slurm.backend import SlurmBackend

        return SlurmBackend()
    from alignkd.errors import UserError

    raise UserError(f"back end {name}: unknown; valid: local, slurm, ssh")


def resolve_choice(choice: BackendChoice, hostfile: Path | None = None) -> str:
    """The name of a back end. ``auto`` is ssh with a hostfile, Slurm where it is installed, else local.

    Raises UserError where Slurm is installed but silent: a run meant for a cluster must not end up here.
    """
    if choice != "auto":
        return choice
    if hostfile is not None:
        return "ssh"
    from launcher.backends.slurm.client import slurm_answers, slurm_is_installed

    if not slurm_is_installed():
        return "local"
    if slurm_answers():
        return "slurm"
    from alignkd.errors import UserError

    raise UserError(
        "sbatch is installed here, but no Slurm controller answers (`scontrol ping`); retry on a login node, "
        "or train on this machine with --backend local"
    )
