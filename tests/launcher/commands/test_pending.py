"""Why a job is pending, in words."""

import pytest

from launcher.commands.pending import pending_reason


@pytest.mark.parametrize(
    ("reason", "text"),
    [
        ("Resources", "not enough free nodes yet; fewer --nodes may start earlier"),
        ("PartitionTimeLimit", "requests more time than the partition allows; lower slurm.time_limit"),
        (
            "ReqNodeNotAvail, UnavailableNodes:n[1-2]",
            "wait, or change slurm.nodelist (n[1-2])",
        ),
        (
            "QOSMaxJobsPerUserLimit",
            "limit of running jobs is reached for this QOS (slurm.qos); ",
        ),
        ("QOSMaxGRESPerUser", "limit of GPUs is reached for this QOS"),
        ("AssocGrpGRES", "limit of GPUs is reached for this account (slurm.account)"),
        ("AssocGrpCpuLimit", "limit of CPUs is reached for this account"),
        ("QOSGrpNodeLimit", "limit of nodes is reached for this QOS"),
        ("AssocMaxWallDurationPerJobLimit", "limit of time is reached for this account"),
        ("launch failed requeued held", "scontrol release"),
        ("SomethingNew", "Slurm says SomethingNew; `man squeue` explains it"),
    ],
)
def test_a_reason_is_a_sentence_with_a_remedy(reason: str, text: str) -> None:
    assert text in pending_reason(reason)
