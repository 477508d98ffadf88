# The environment of the run: job.sbatch reads it on the first node, the ranks inherit it. To be edited by hand.
# shellcheck shell=bash

export PYTHON=/venv/bin/python
# Where alignkd is, for an interpreter that it was not installed into; last, so that it hides nothing.
export PYTHONPATH=${PYTHONPATH:+$PYTHONPATH:}/checkout
# The folder that the job was submitted from must not be searched for modules.
export PYTHONSAFEPATH=1
# A log has every line of a rank that is killed.
export PYTHONUNBUFFERED=1
# DeepSpeed lets these replace a configuration that was passed explicitly.
unset "${!DEEPSPEED_CONFIG@}"
# Restarts without a new checkpoint in between before the run is given up.
export ALIGNKD_MAX_RESTARTS=3
