#!/bin/bash
# One rank of the run: `srun` starts this once per GPU, with RUN and env.sh in its environment (see job.sbatch).

exec >>"$RUN/logs/rank-$SLURM_PROCID.log" 2>&1
echo "=== attempt $ALIGNKD_ATTEMPT: job $SLURM_JOB_ID on ${SLURMD_NODENAME:-?}, $(date -Is)"

export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID NODE_RANK=$SLURM_NODEID
export WORLD_SIZE=$SLURM_NTASKS LOCAL_WORLD_SIZE=4
export OMP_NUM_THREADS=${SLURM_CPUS_PER_TASK:-1}

# Slurm sends the signals to python as well. This shell only has to outlive it, to write down how it ended.
trap : USR1 TERM
# On CPUs DeepSpeed compiles an operator once; ranks that compile it at the same time would lock each other out.
TORCH_EXTENSIONS_DIR=$("$PYTHON" -m launcher.operators) || exit
export TORCH_EXTENSIONS_DIR
"$PYTHON" -m alignkd.train "$RUN"
code=$?

# srun hides the code of the rank that failed behind those of the ranks it killed; this file does not.
mkdir -p "$RUN/exits" && echo "$code $(date +%s.%N)" >"$RUN/exits/.rank-$RANK" &&
    mv "$RUN/exits/.rank-$RANK" "$RUN/exits/rank-$RANK"

# 85 and 86 say "saved". srun would take them for failures and kill the ranks that are about to leave.
if [[ $code -eq 85 || $code -eq 86 ]]; then
    exit 0
fi
exit "$code"
