# shellcheck shell=bash
# Copy to sbatches/site.sh (git does not see it): what only this cluster needs. launch.sh reads it when it submits, the
# jobs when they start.
export SBATCH_PARTITION=gpu SBATCH_ACCOUNT=my-project SBATCH_TIMELIMIT=24:00:00 # read by sbatch
export HF_HOME=$HOME/scratch/huggingface # on a file system that compute nodes see; filled by launch.sh --prefetch
# if [ -n "${SLURM_JOB_ID:-}" ]; then module load cuda/12.8 gcc; fi
# PYTHON=sbatches/in_container.sh        # a script that runs `python "$@"` in your container
