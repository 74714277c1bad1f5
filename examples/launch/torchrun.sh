#!/usr/bin/env bash
# One node, every GPU:        examples/launch/torchrun.sh CONFIG [--section.key value ...]
# Several nodes, on each:     NODES=4 HEAD=node0:29500 examples/launch/torchrun.sh CONFIG
set -euo pipefail
config=$1
shift
exec torchrun \
    --nnodes "${NODES:-1}" --nproc-per-node "${GPUS:-gpu}" \
    --rdzv-backend c10d --rdzv-endpoint "${HEAD:-localhost:0}" --rdzv-id "${JOB_ID:-megamm}" \
    -m megamm.train --config "$config" "$@"
