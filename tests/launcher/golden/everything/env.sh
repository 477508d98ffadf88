# The environment of the run: job.sbatch reads it on the first node, the ranks inherit it. To be edited by hand.
# shellcheck shell=bash

export PYTHON=/venv/bin/python
module load cuda/12.4 gcc
conda activate alignkd
# Where alignkd is, for an interpreter that it was not installed into; last, so that it hides nothing.
export PYTHONPATH=${PYTHONPATH:+$PYTHONPATH:}/checkout
# The folder that the job was submitted from must not be searched for modules.
export PYTHONSAFEPATH=1
# A log has every line of a rank that is killed.
export PYTHONUNBUFFERED=1
# DeepSpeed lets these replace a configuration that was passed explicitly.
unset "${!DEEPSPEED_CONFIG@}"
export NCCL_SOCKET_IFNAME=ib0
export GLOO_SOCKET_IFNAME=ib0
export NCCL_DEBUG=WARN
export MESSAGE='it'"'"'s $HOME'
# Never written down: it has to come from the shell that submits.
[[ -n ${HF_TOKEN-} ]] || echo "warning: the job was submitted without HF_TOKEN in its environment" >&2
# Restarts without a new checkpoint in between before the run is given up.
export ALIGNKD_MAX_RESTARTS=5
