#!/usr/bin/env bash
# A study on a Slurm cluster, a job per ladder over several nodes:
#   NODES=2 GPUS=8 CPUS=64 PARTITION=gpu examples/launch/slurm-study.sh STUDY.yaml OUT
# It waits for its jobs: run it in tmux on the login node, and again whenever it was ended.
set -euo pipefail
if [ $# -ne 2 ]; then
    sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$0"
    exit 2
fi
exec "${PYTHON:-python}" tools/run_study.py "$1" --out "$2" --launcher slurm \
    --slurm-param "nodes=${NODES:-1}" --slurm-param "gpus_per_node=${GPUS:-8}" --slurm-param "cpus_per_task=${CPUS:-64}" \
    --slurm-param "timeout_min=${MINUTES:-1440}" ${PARTITION:+--slurm-param "slurm_partition=$PARTITION"}
