# The environment of the run: job.sbatch sources it on the first node, the ranks inherit it. You may edit this file.
# shellcheck shell=bash

export PYTHON=/venv/bin/python
module load cuda/12.4 gcc
conda activate alignkd
# Finds alignkd if it is not installed for this interpreter; comes last, so that it hides nothing.
export PYTHONPATH=${PYTHONPATH:+$PYTHONPATH:}/checkout
# Modules must not be imported from the folder that the job was submitted from.
export PYTHONSAFEPATH=1
# The log keeps every line of a rank that is killed.
export PYTHONUNBUFFERED=1
# DeepSpeed lets these override a configuration that was passed explicitly.
unset "${!DEEPSPEED_CONFIG@}"
export NCCL_SOCKET_IFNAME='=ib0'
export GLOO_SOCKET_IFNAME=ib0
export NCCL_DEBUG=WARN
export MESSAGE='it'"'"'s $HOME'
# Never stored: it must come from the shell that submits the job. Over ssh it comes later.
[[ -n ${HF_TOKEN-}${ALIGNKD_SECRETS_FOLLOW-} ]] || echo "warning: the job was submitted without HF_TOKEN in its environment" >&2
# The run is given up after this many restarts in a row without a new checkpoint.
export ALIGNKD_MAX_RESTARTS=5
