#!/bin/bash
# One rank of the run, with RUN and env.sh in its environment: `srun` starts this script once per GPU (see job.sbatch).
# The ssh back end does the same, with ALIGNKD_* in place of SLURM_*.
# Script format 3; `alignkd resume` re-renders scripts of another format.

RANK=${ALIGNKD_RANK:-$SLURM_PROCID}
exec >>"$RUN/logs/rank-$RANK.log" 2>&1
echo "=== attempt $ALIGNKD_ATTEMPT: job ${SLURM_JOB_ID:-none} on ${SLURMD_NODENAME:-$HOSTNAME}, process $$, $(date -Is)"
if [[ $RANK -eq 0 && -n ${SLURM_STEP_ID-} ]]; then # what `alignkd stop` signals inside an allocation of the user's
    echo "$SLURM_JOB_ID.$SLURM_STEP_ID" >"$RUN/exits/step"
fi
PYTHON=python3 # of the container, which does not hold the other one

export RANK LOCAL_RANK=${ALIGNKD_LOCAL_RANK:-$SLURM_LOCALID} NODE_RANK=${ALIGNKD_NODE_RANK:-$SLURM_NODEID}
export WORLD_SIZE=${ALIGNKD_WORLD_SIZE:-$SLURM_NTASKS} LOCAL_WORLD_SIZE=4
export OMP_NUM_THREADS=${SLURM_CPUS_PER_TASK:-1}

# Without it DeepSpeed trains on the CPU where it finds no driver.
export DS_ACCELERATOR=${DS_ACCELERATOR:-cuda}
# Batches differ in length: without it the free memory of a GPU falls into pieces.
export PYTORCH_ALLOC_CONF=${PYTORCH_ALLOC_CONF:-expandable_segments:True}
# Slurm signals python as well. This shell only has to outlive it, to record how it ended.
trap : USR1 TERM USR2 # USR2 asks for python's stacks
"$PYTHON" -m alignkd.train "$RUN"
code=$?

# srun hides the exit code of the failed rank behind those of the ranks that it killed; this file keeps it. Only shell
# builtins write it: the SIGTERM that ends the other ranks would end a program, too. It also counts the ranks that had
# ended before, as the clocks of two nodes need not agree on which of them failed first.
printf -v now '%(%s)T' -1
now=${EPOCHREALTIME:-$now} # bash 5
shopt -s nullglob
set -- "$RUN"/exits/rank-*
echo "$code ${now/,/.} $#" >"$RUN/exits/rank-$RANK"

# 85 and 86 mean "saved". srun would treat them as failures and kill ranks that are still exiting.
if [[ -z ${ALIGNKD_RANK-} && ($code -eq 85 || $code -eq 86) ]]; then
    exit 0
fi
exit "$code"
