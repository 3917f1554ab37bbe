#!/bin/bash
# Trains on the GPUs of several nodes under Slurm, one process for each GPU:
#
#   sbatch --nodes 4 scripts/slurm.sh configs/billion.py --run-dir /shared/runs/billion
#
# from the root of a checkout on a file system that all nodes share, after `scripts/setup.sh cuda`
# there. What follows the script's name goes to `sparsex train`; the run directory
# has to be on a shared file system, too. The same command goes on where the run stands.
#
# Change --ntasks-per-node and --gpus-per-node together. Do not use --gpus-per-task: JAX picks the
# GPU of a process by the number of its task on the node, so each has to see them all.
#
#SBATCH --job-name=sparsex
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --output=sparsex-%j.log
#SBATCH --open-mode=append
# SIGTERM five minutes before the time is over: all processes save after the same step and end.
#SBATCH --signal=TERM@300
set -euo pipefail

cd "${SLURM_SUBMIT_DIR:-.}"
# Not killed on a bad exit: the other processes say which one was lost, and end by themselves.
exec srun --label --kill-on-bad-exit=0 .venv/bin/sparsex train "$@"
