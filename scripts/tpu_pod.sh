#!/bin/bash
# Trains on all hosts of a Cloud TPU slice, one process for each host:
#
#   scripts/tpu_pod.sh NAME ZONE configs/billion.py --run-dir /mnt/shared/runs/billion
#
# NAME is that of the TPU VM, made before with
#
#   gcloud compute tpus tpu-vm create NAME --zone ZONE --accelerator-type v5litepod-256 \
#     --version v2-alpha-tpuv5-lite
#
# A checkout has to be in ~/sparse-x of every host, after `scripts/setup.sh tpu` there (with
# --worker=all, as below); /mnt/shared is a file system that all hosts mount, Filestore, say. What
# follows ZONE goes to `sparsex train`; JAX finds the other hosts by itself. To save and stop:
#
#   gcloud compute tpus tpu-vm ssh NAME --zone ZONE --worker=0 --command "pkill -TERM -x sparsex"
#
set -euo pipefail

if [ $# -lt 3 ]; then
  echo "sparsex: usage: scripts/tpu_pod.sh NAME ZONE PRESET [arguments of sparsex train]" >&2
  exit 2
fi
name=$1 zone=$2
shift 2
printf -v arguments ' %q' "$@"
exec gcloud compute tpus tpu-vm ssh "$name" --zone "$zone" --worker=all \
  --command "cd sparse-x && exec .venv/bin/sparsex train$arguments"
