#!/usr/bin/env bash
# Builds the image on a small CPU base with buildah, without a Docker daemon, and trains in it. As root:
#   apt-get install buildah debootstrap && tests/docker/run.sh
# Takes some minutes and about 10 GB below WORK (/tmp/megamm-docker). TORCH names the torch of the base. Variables PIP_*
# hold inside, too; VOLUMES="HOST:INSIDE:ro ..." is seen inside, such as a folder of wheels or certificates.
set -euo pipefail
cd "$(dirname "$0")/../.."
work=${WORK:-/tmp/megamm-docker}
export STORAGE_DRIVER=vfs BUILDAH_ISOLATION=chroot TMPDIR=$work/tmp
buildah() { command buildah --root "$work/images" --runroot "$work/run" "$@"; }
mkdir -p "$work/tmp"
flags=(--isolation chroot)
for volume in ${VOLUMES:-}; do flags+=(--volume "$volume"); done
torch=${TORCH:-torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu}

if ! buildah inspect --type image megamm-base >/dev/null 2>&1; then
    echo "== a base: Debian, Python, torch"
    rm -rf "$work/debian"
    debootstrap --variant=minbase --include=python3,python3-venv,gcc,libc6-dev,ca-certificates bookworm "$work/debian"
    base=$(buildah from scratch)
    buildah add "$base" "$work/debian" / >/dev/null
    rm -rf "$work/debian"
    buildah config --env PATH=/venv/bin:/usr/local/bin:/usr/bin:/bin "$base"
    for name in ${!PIP_@}; do buildah config --env "$name=${!name}" "$base"; done
    buildah run "${flags[@]}" "$base" -- sh -c "python3 -m venv /venv && pip install --no-cache-dir $torch"
    buildah commit --rm "$base" megamm-base >/dev/null
fi

echo "== the image"
buildah bud --format docker "${flags[@]}" --build-arg BASE_IMAGE=localhost/megamm-base -t megamm .

echo "== what it is"
about=$(buildah inspect --type image megamm)
python3 - "$about" <<'PY'
import json, sys
about = json.loads(sys.argv[1])["Docker"]["config"]
assert about["User"] == "1000:1000", about["User"]
assert about["Entrypoint"] == ["python", "-m", "megamm.launch"], about["Entrypoint"]
assert "--dry-run" in about["Healthcheck"]["Test"], about["Healthcheck"]
print("user", about["User"], "entry point", *about["Entrypoint"])
PY

box=$(buildah from megamm)
trap 'buildah rm "$box" >/dev/null' EXIT
inside() { buildah run --isolation chroot "$box" -- "$@"; }
echo "== health check, user, torch"
inside python -m megamm.train --dry-run --model.vocab_size=50432 --model.image_size=224 --model.patch_size=14 --train.steps=1
[ "$(inside id -u)" = 1000 ]
inside python -c "import torch, megamm, megamm_kernels, megamm_laws; print('torch', torch.__version__)"
echo "== five steps on two ranks by the entry point"
inside sh -c '
    set -e
    python tools/train_tokenizer.py scenes:caption --num-documents 200 --vocab-size 320 --out tok.json
    python tools/prepare_data.py scenes:caption --num-documents 100 --out data/cap --tokenizer tok.json \
        --image-size 16 --patch-size 8 --max-length 128 --val-fraction 0.2
    cat > c.yaml <<YAML
model: {architecture: early, width: 16, depth: 2, head_dim: 8, hidden_multiple: 16}
data: {row_length: 128, workers: 1, sources: {cap: {path: data/cap}}}
schedule: {warmup_steps: 2}
train: {steps: 5, batch_rows: 4, log_every: 1, run_dir: runs/five, device: cpu}
eval: {rows: 4}
YAML
    grep -q "$(hostname)" /etc/hosts || export GLOO_SOCKET_IFNAME=lo
    python -m megamm.launch --standalone --local-addr 127.0.0.1 --nproc-per-node 2 -m megamm.train --config c.yaml
    grep -q "\"steps\": 5" runs/five/result.json'
echo OK
