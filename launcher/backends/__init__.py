"""Back ends by name. Each is imported when it is asked for: most commands need one of them.

`alignkd status` asks them for live jobs, so they import configurations and progress bars where they use them.
"""

from __future__ import annotations

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


def resolve_choice(choice: BackendChoice) -> str:
    """The name of a back end: ``auto`` is Slurm where a controller answers, else this machine."""
    if choice != "auto":
        return choice
    from launcher.backends.slurm.client import slurm_answers

    return "slurm" if slurm_answers() else "local"
