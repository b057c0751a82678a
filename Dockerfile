# syntax=docker/dockerfile:1
# scanloom on Ray's own image, which is named by digest, so that what was tested is what runs:
# `make image RAY_DIGEST=sha256:...`. For processors alone: RAY_IMAGE=rayproject/ray:2.60.0-py311 with its digest, and
# PyTorch's index of CPU builds as PIP_EXTRA_INDEX_URL. Nothing is installed when a container starts.
ARG RAY_IMAGE=rayproject/ray:2.60.0-py311-gpu
ARG RAY_DIGEST

# --- every distribution as a wheel ----------------------------------------------------------------------------------
FROM ${RAY_IMAGE}@${RAY_DIGEST} AS wheels
ARG PIP_EXTRA_INDEX_URL
USER 1000
WORKDIR /home/ray/build
COPY constraints.txt ./
# DeepSpeed is built against the torch that is there, without its CUDA kernels, which it compiles where it needs them.
RUN python -m pip install --no-cache-dir -c constraints.txt torch setuptools wheel \
    && python -m pip wheel --no-cache-dir -w /home/ray/wheels -c constraints.txt torch setuptools wheel \
    && DS_BUILD_OPS=0 python -m pip wheel --no-cache-dir -w /home/ray/wheels -c constraints.txt \
        --no-build-isolation deepspeed
COPY pyproject.toml README.md LICENSE ./
COPY platform platform
RUN python -m pip wheel --no-cache-dir -w /home/ray/wheels -c constraints.txt --find-links /home/ray/wheels ".[train]"

# --- what runs ------------------------------------------------------------------------------------------------------
FROM ${RAY_IMAGE}@${RAY_DIGEST}
LABEL org.opencontainers.image.title="scanloom" org.opencontainers.image.licenses="Apache-2.0"
# A number, by which Kubernetes sees that it is not root.
USER 1000
# The wheels are of one version each.
# hadolint ignore=DL3013
RUN --mount=type=bind,from=wheels,source=/home/ray/wheels,target=/wheels \
    python -m pip install --no-cache-dir --no-index --find-links /wheels "scanloom[train]"
WORKDIR /srv/scanloom
COPY jobs jobs
COPY serve serve
ENV PYTHONPATH=/srv/scanloom PYTHONUNBUFFERED=1 RAY_USAGE_STATS_ENABLED=0 \
    RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH=serve.proxy:middlewares
# KubeRay's probes are bash and wget; the versions must be those that the manifests name; nothing may be left to import.
RUN bash -c 'type bash wget' \
    && python -c "import ray; assert ray.__version__ == '2.60.0', ray.__version__" \
    && python -m jobs.generate --help \
    && python -c "import deepspeed, serve.app, serve.proxy" \
    && scanloom doctor
CMD ["scanloom", "--help"]
