#!/bin/bash
# One rank of the run, with RUN and env.sh in its environment: `srun` starts this once per GPU (see job.sbatch).
# The ssh back end does the same, and says in ALIGNKD_* what Slurm says in SLURM_*.

RANK=${ALIGNKD_RANK:-$SLURM_PROCID}
exec >>"$RUN/logs/rank-$RANK.log" 2>&1
echo "=== attempt $ALIGNKD_ATTEMPT: job ${SLURM_JOB_ID:-none} on ${SLURMD_NODENAME:-$HOSTNAME}, process $$, $(date -Is)"
if [[ $RANK -eq 0 && -n ${SLURM_STEP_ID-} ]]; then # whom `alignkd stop` signals, where the job is not the run's own
    echo "$SLURM_JOB_ID.$SLURM_STEP_ID" >"$RUN/exits/step"
fi

export RANK LOCAL_RANK=${ALIGNKD_LOCAL_RANK:-$SLURM_LOCALID} NODE_RANK=${ALIGNKD_NODE_RANK:-$SLURM_NODEID}
export WORLD_SIZE=${ALIGNKD_WORLD_SIZE:-$SLURM_NTASKS} LOCAL_WORLD_SIZE=4
export OMP_NUM_THREADS=${SLURM_CPUS_PER_TASK:-1}

# Slurm sends the signals to python as well. This shell only has to outlive it, to write down how it ended.
trap : USR1 TERM
"$PYTHON" -m alignkd.train "$RUN"
code=$?

# srun hides the code of the rank that failed behind those of the ranks it killed; this file does not. No program is
# started for it: the SIGTERM for the ranks that are left would end that, too.
printf -v now '%(%s)T' -1
now=${EPOCHREALTIME:-$now} # bash 5
echo "$code ${now/,/.}" >"$RUN/exits/rank-$RANK"

# 85 and 86 say "saved". srun would take them for failures and kill the ranks that are about to leave.
if [[ -z ${ALIGNKD_RANK-} && ($code -eq 85 || $code -eq 86) ]]; then
    exit 0
fi
exit "$code"
