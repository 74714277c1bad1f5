# make docker, or: docker build --build-arg BASE_IMAGE=IMAGE -t megamm .
# docker run --gpus all --ipc host -v $PWD/runs:/workspace/runs -v $PWD/data:/workspace/data megamm \
#     --nproc-per-node 8 -m megamm.train --config examples/nmm/early-275m.yaml
#
# The base brings Python, torch (2.11 to 2.13) and a C compiler. NVIDIA's also brings apex, flash-attn and
# transformer-engine, built against its torch: nothing here replaces it. Take the newest release of it whose torch fits.
ARG BASE_IMAGE=nvcr.io/nvidia/pytorch:26.05-py3
FROM ${BASE_IMAGE}

WORKDIR /opt/megamm
COPY pyproject.toml README.md LICENSE ./
# What pyproject.toml asks for, without torch, which is held at what the base has.
RUN python -c "import sys, tomllib, torch; \
fits = (2, 11) <= tuple(map(int, torch.__version__.split('.')[:2])) < (2, 14); \
fits or sys.exit('BASE_IMAGE: its torch is ' + torch.__version__ + '; give one with 2.11 to 2.13'); \
wanted = tomllib.load(open('pyproject.toml', 'rb'))['project']['dependencies']; \
open('/tmp/wanted', 'w').write('\n'.join(w for w in wanted if not w.startswith('torch>'))); \
open('/tmp/held', 'w').write('torch==' + torch.__version__)" \
    && pip install --no-cache-dir -r /tmp/wanted -c /tmp/held && rm /tmp/wanted /tmp/held
COPY kernels kernels
COPY laws laws
COPY megamm megamm
RUN pip install --no-cache-dir --no-deps .

WORKDIR /workspace
COPY tools tools
COPY examples examples
RUN getent passwd 1000 || useradd --uid 1000 --no-create-home megamm; chown 1000:1000 /workspace
ENV HOME=/workspace
USER 1000:1000

# Needs neither data nor a GPU: settings are read, the model is counted.
HEALTHCHECK --interval=5m --timeout=60s --start-period=30s CMD ["python", "-m", "megamm.train", "--dry-run", \
    "--model.vocab_size=50432", "--model.image_size=224", "--model.patch_size=14", "--train.steps=1"]
ENTRYPOINT ["python", "-m", "megamm.launch"]
CMD ["--nproc-per-node=1", "-m", "megamm.train", "--help"]
