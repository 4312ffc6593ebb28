# An image with the project set up by the same scripts as anywhere else; it runs on the CPU by default.
#
#   docker build --tag diffusion-exporter .
#   docker run --rm --volume "$PWD/runs:/app/runs" diffusion-exporter run shapes --out runs/shapes
#   docker run --rm --entrypoint ci/test.sh diffusion-exporter
#
# For NVIDIA GPUs, with TensorRT-RTX beside OpenVINO and ONNX Runtime:
#
#   docker build --build-arg DEVICE=cuda --tag diffusion-exporter:cuda .
#   docker run --rm --gpus all diffusion-exporter:cuda run shapes --out runs/shapes
#
# Which build of torch 2.13.0 comes is decided by where pip looks. On 64-bit x86 the ordinary index holds the CUDA
# build, which also runs on a CPU but is several gigabytes larger; name a list of CPU builds for a small image:
#
#   docker build --build-arg PIP_EXTRA_INDEX_URL=<index with CPU builds of torch> --tag diffusion-exporter .
ARG PYTHON=3.11
ARG DEVICE=cpu
FROM python:${PYTHON}-slim-bookworm AS base

RUN useradd --create-home --uid 1000 --user-group exporter && install --directory --owner 1000 --group 1000 /app
USER 1000:1000
WORKDIR /app
ENV PIP_NO_CACHE_DIR=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    HF_HUB_DISABLE_TELEMETRY=1

FROM base AS cpu
ENV SETUP_EXTRAS=openvino,coreml,dev

FROM base AS cuda
ENV SETUP_EXTRAS=openvino,coreml,tensorrt-rtx,dev \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility

FROM ${DEVICE} AS image
WORKDIR /app

# The environment changes with these files only, so that editing the sources does not install everything again.
COPY --chown=1000:1000 pyproject.toml README.md LICENSE ./
COPY --chown=1000:1000 ci/setup.sh ci/
COPY --chown=1000:1000 exporter/__init__.py exporter/
COPY --chown=1000:1000 targets/__init__.py targets/
COPY --chown=1000:1000 calibration/__init__.py calibration/
ARG PIP_EXTRA_INDEX_URL=
RUN bash ci/setup.sh

COPY --chown=1000:1000 . .
ENV PATH="/app/.venv/bin:${PATH}"
RUN exporter --help

ENTRYPOINT ["exporter"]
CMD ["--help"]
