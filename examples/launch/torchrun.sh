#!/usr/bin/env bash
# One node, every GPU:      examples/launch/torchrun.sh CONFIG.yaml [--section.key value ...]
# Several nodes, on each:   NODES=4 HEAD=node0:29500 JOB_ID=7 examples/launch/torchrun.sh CONFIG.yaml
#
#   NODES     number of nodes (1)
#   RANKS     ranks per node (auto: one per GPU, without GPUs one per core)
#   HEAD      HOST:PORT of the first node, any free port, the same on all nodes (one node: found by itself)
#   JOB_ID    any word, the same on all nodes and different for each job (megamm)
#   RESTARTS  how often ranks that died are replaced before giving up (3)
#   STOPPED   exit code after a stop signal (75)
#   PYTHON    interpreter (python)
#
# SIGTERM and SIGUSR1 save and end it with exit code 75: start it again, and it goes on. Exit code 2 is bad input.
# python -m megamm.launch is torchrun with the settings that this needs; see docs/cluster.md.
set -euo pipefail
if [ $# -eq 0 ] || [ "$1" = --help ] || [ "$1" = -h ]; then
    sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$0"
    [ $# -gt 0 ] && exit 0 || exit 2
fi
if [ ! -f "$1" ]; then
    echo "error: $1: no such config; usage: examples/launch/torchrun.sh CONFIG.yaml [--section.key value ...]" >&2
    exit 2
fi
if [ "${NODES:-1}" != 1 ] && [ -z "${HEAD:-}" ]; then
    echo "error: HEAD: not set, but NODES is $NODES; give HOST:PORT of the first node" >&2
    exit 2
fi
config=$1
shift
export MEGAMM_STOPPED_CODE=${STOPPED:-75}
exec "${PYTHON:-python}" -m megamm.launch \
    --nnodes "${NODES:-1}" --nproc-per-node "${RANKS:-auto}" --max-restarts "${RESTARTS:-3}" \
    --rdzv-backend c10d --rdzv-endpoint "${HEAD:-localhost:0}" --rdzv-id "${JOB_ID:-megamm}" \
    -m megamm.train --config "$config" "$@"
