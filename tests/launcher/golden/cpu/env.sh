# The environment of the run: job.sbatch sources it on the first node, the ranks inherit it. You may edit this file.
# shellcheck shell=bash

export PYTHON=/venv/bin/python
# Finds alignkd if it is not installed for this interpreter; comes last, so that it hides nothing.
export PYTHONPATH=${PYTHONPATH:+$PYTHONPATH:}/checkout
# Modules must not be imported from the folder that the job was submitted from.
export PYTHONSAFEPATH=1
# The log keeps every line of a rank that is killed.
export PYTHONUNBUFFERED=1
# DeepSpeed lets these override a configuration that was passed explicitly.
unset "${!DEEPSPEED_CONFIG@}"
export DS_ACCELERATOR=cpu CUDA_VISIBLE_DEVICES=
# Large tensors are new memory in every step: huge pages spare most of the page faults.
export THP_MEM_ALLOC_ENABLE=${THP_MEM_ALLOC_ENABLE:-1}
# The run is given up after this many restarts in a row without a new checkpoint.
export ALIGNKD_MAX_RESTARTS=3
