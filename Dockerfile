# First draft: a CUDA image that trains; built on a machine with a Docker engine.
#   docker build -t megamm . && docker run --gpus all --shm-size 8g -v $PWD/runs:/workspace/runs megamm \
#       torchrun --nproc-per-node 8 -m megamm.train --config examples/configs/early_275m.yaml
FROM python:3.12-slim

RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev git make && rm -rf /var/lib/apt/lists/*
WORKDIR /opt/megamm
COPY kernels kernels
COPY pyproject.toml README.md LICENSE ./
COPY megamm megamm
RUN pip install --no-cache-dir torch==2.13.0 && pip install --no-cache-dir ./kernels .
COPY tools tools
COPY examples examples
WORKDIR /workspace
CMD ["python", "-m", "megamm.train", "--help"]
