# comfy-endpoint: ComfyUI at a pinned version in /ComfyUI, the worker in /opt/worker, and the models that MODELS names.
#
#   docker build -t comfy-endpoint .        another ComfyUI: --build-arg COMFYUI_REF=<tag, branch or commit>
#   docker build --build-arg MODELS=RepoID:Filename:Target,... --secret id=HF_TOKEN,env=HF_TOKEN .
#
# Layers are ordered by how seldom they change: a new worker is some hundred kB to push and pull, and a new ComfyUI does
# not move torch. Only features that Docker, buildah and podman share.

# No CUDA base image: torch's wheels bring the CUDA libraries, and RunPod's host mounts the driver.
ARG BASE_IMAGE=python:3.12-slim-trixie


# ComfyUI's source without its history; git stays in this stage.
# hadolint ignore=DL3006
FROM ${BASE_IMAGE} AS comfyui-source
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates git
ARG COMFYUI_REPO=https://github.com/Comfy-Org/ComfyUI.git
ARG COMFYUI_REF=v0.18.1
WORKDIR /ComfyUI
# fetch, because clone --branch takes no commit. Without bytecode a boot takes 16 s instead of 7 (0.18.1).
# The symlinks are for people who come by SSH: start.sh makes their targets, on the RAM disk.
RUN git init -q . \
    && git fetch -q --depth 1 "$COMFYUI_REPO" "$COMFYUI_REF" \
    && git checkout -q FETCH_HEAD \
    && rm -rf .git input output temp \
    && ln -s /dev/shm/comfyui/input /dev/shm/comfyui/output /dev/shm/comfyui/temp . \
    && python3 -m compileall -q .


# hadolint ignore=DL3006
FROM ${BASE_IMAGE} AS base

# openssh-server  debugging through a tunnel. start.sh runs it only with PUBLIC_KEY and makes the host key at boot:
#                 the keys that the package makes would be the same, and known, on every machine
# tini            PID 1: hands SIGTERM to start.sh and reaps what nobody waits for
# No ffmpeg: ComfyUI reads and writes video and audio with PyAV, whose wheel brings FFmpeg's libraries.
# No versions: Debian keeps only the newest of each, and the base image fixes the release.
# hadolint ignore=DL3008
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
        openssh-server \
        tini \
    && apt-get clean \
    && rm -rf /var/lib/apt/lists/* /etc/ssh/ssh_host_*

# torchvision and torchaudio are built for one torch: change all three. These wheels hold CUDA 12.8; those of torch 2.11
# hold CUDA 13, which wants a newer driver, and with which ComfyUI uses its fast fp8 kernels (comfy/quant_ops.py, 0.18.1).
ARG TORCH_PACKAGES="torch==2.10.0 torchvision==0.25.0 torchaudio==2.10.0"
# hadolint ignore=SC2086
RUN python3 -m venv /ComfyUI/.venv \
    && /ComfyUI/.venv/bin/pip install --no-cache-dir $TORCH_PACKAGES
# Named again, so that nothing in ComfyUI's requirements can move them.
# hadolint ignore=SC2086
RUN --mount=type=bind,from=comfyui-source,source=/ComfyUI/requirements.txt,target=/tmp/requirements.txt \
    /ComfyUI/.venv/bin/pip install --no-cache-dir $TORCH_PACKAGES -r /tmp/requirements.txt

WORKDIR /opt/worker
RUN --mount=type=bind,source=requirements.txt,target=/tmp/requirements.txt \
    python3 -m venv .venv \
    && .venv/bin/pip install --no-cache-dir --no-deps --require-hashes -r /tmp/requirements.txt

COPY --from=comfyui-source /ComfyUI /ComfyUI
COPY --chmod=755 start.sh ./
COPY rp_handler.py utils.py ./
COPY worker ./worker
RUN .venv/bin/python -m compileall -q rp_handler.py utils.py worker

# What CUDA base images set: which devices the host's container runtime mounts, and what of its driver.
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
# SSH. ComfyUI listens on 127.0.0.1 only.
EXPOSE 22
ENTRYPOINT ["tini", "--", "/opt/worker/start.sh"]


# The same with models, in a layer of their own. The token is a build secret: it is in no layer and no history. Without
# MODELS this is the base.
FROM base AS baked
ARG MODELS=
RUN --mount=type=secret,id=HF_TOKEN \
    if [ -f /run/secrets/HF_TOKEN ]; then HF_TOKEN=$(cat /run/secrets/HF_TOKEN); export HF_TOKEN; fi \
    && MODELS="$MODELS" .venv/bin/python utils.py
