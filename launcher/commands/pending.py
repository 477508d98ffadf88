"""Slurm's reasons for which a job is pending, in words, and what to do about them."""

from __future__ import annotations

import re

_REASONS = {
    "None": "Slurm has not considered it yet",
    "Priority": "jobs with a higher priority come first; it starts by itself",
    "Resources": "not enough free nodes yet; fewer --nodes may start earlier",
    "BeginTime": "Slurm holds a requeued job back for about two minutes",
    "Cleaning": "Slurm is cleaning up after its last start",
    "Dependency": "waits for another job",
    "DependencyNeverSatisfied": "the job that it waits for has failed; resume the run of that job",
    "PartitionTimeLimit": "requests more time than the partition allows; lower slurm.time_limit",
    "PartitionNodeLimit": "requests more nodes than the partition has; resume it with fewer --nodes",
    "PartitionDown": "the partition is down; wait, or name another slurm.partition",
    "PartitionInactive": "the partition accepts no starts now; wait, or name another slurm.partition",
    "PartitionConfig": "the partition does not allow this request; compare `scontrol show partition`",
    "AccountNotAllowed": "the partition does not allow this account; set slurm.account",
    "InvalidAccount": "Slurm does not know this account; set slurm.account",
    "InvalidQOS": "Slurm does not know this QOS; set slurm.qos",
    "QOSNotAllowed": "this account may not use this QOS; set slurm.qos",
    "BadConstraints": "no node has all that it requests; see slurm.constraint, memory and cpus_per_task",
    "Constraints": "no node with slurm.constraint is free yet",
    "NodeDown": "a node that it needs is down; exclude it with slurm.exclude",
    "ReqNodeNotAvail": "a node that it needs is down or reserved; wait, or change slurm.nodelist",
    "Reservation": "waits for its reservation to begin (slurm.reservation)",
    "ReservationDeleted": "its reservation is gone; change slurm.reservation",
    "InvalidReservation": "Slurm does not know slurm.reservation",
    "Licenses": "not enough free licenses yet",
    "JobHeldUser": "held; release it with `scontrol release`",
    "JobHeldAdmin": "held by an administrator; ask why",
    "JobHoldMaxRequeue": "requeued too often for this cluster, and held; release it with `scontrol release`",
    "JobLaunchFailure": "its last start failed on a node; see `alignkd logs RUN --job`",
    "launch failed requeued held": "its last start failed on a node, and it is held; `scontrol release`",
    "NonZeroExitCode": "its last start failed; see `alignkd logs RUN --errors`",
    "TimeLimit": "its time limit is used up",
}
# For families of reasons: the first pattern that matches the whole reason.
_PATTERNS = (
    (r"(QOS|Assoc).*(GRES|Gres|gres|TRES).*", "the limit of GPUs is reached for this {who}"),
    (r"(QOS|Assoc).*(CPU|Cpu).*", "the limit of CPUs is reached for this {who}"),
    (r"(QOS|Assoc).*(Node).*", "the limit of nodes is reached for this {who}"),
    (r"(QOS|Assoc).*(Mem|Memory).*", "the limit of memory is reached for this {who}"),
    (r"(QOS|Assoc).*(Wall|Time|Minutes|RunMinutes).*", "the limit of time is reached for this {who}"),
    (r"(QOS|Assoc).*(Job|Submit).*", "the limit of running jobs is reached for this {who}"),
)


def pending_reason(reason: str) -> str:
    """A sentence for what squeue shows as the reason; an unknown one is quoted."""
    name = reason.partition(",")[0].strip()  # "ReqNodeNotAvail, UnavailableNodes:n1"
    for pattern, text in _PATTERNS:
        if found := re.fullmatch(pattern, name):
            who = "QOS (slurm.qos)" if found[1] == "QOS" else "account (slurm.account)"
            return f"{text.format(who=who)}; it starts when other jobs have ended ({name})"
    known = _REASONS.get(name)
    if known is None:
        return f"Slurm says {reason}; `man squeue` explains it under JOB REASON CODES"
    nodes = re.search(r"(?:UnavailableNodes|May be reserved)[^:]*:(\S+)", reason)
    return f"{known} ({nodes[1]})" if nodes else known
