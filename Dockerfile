# comfy-endpoint: ComfyUI at a pinned version in /ComfyUI, the worker in /opt/worker, and the models that MODELS names.
#
#   docker build -t comfy-endpoint .                      --target base leaves MODELS out
#   docker build --build-arg MODELS=RepoID:Filename:Target,... --secret id=HF_TOKEN,env=HF_TOKEN .
#   docker build --build-arg COMFYUI_REF=<tag, branch or commit> --build-arg TORCH=torch-cuda-13.0 .
#
# Layers are ordered by how seldom they change: a new worker is some hundred kB to push and pull, and a new ComfyUI does
# not move torch. Only features that Docker, buildah and podman share.

# No CUDA base image: torch's wheels bring the CUDA libraries, and RunPod's host mounts the driver.
ARG BASE_IMAGE=python:3.12-slim-trixie


# The sources of ComfyUI and of the custom nodes, without their history; git stays in this stage.
# hadolint ignore=DL3006
FROM ${BASE_IMAGE} AS sources
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
COPY custom_nodes.txt image/custom_nodes.sh /
# Bytecode of what will not compile (templates, Python 2) is not missed: an import that fails is found below.
RUN mkdir /custom_nodes \
    && bash /custom_nodes.sh fetch /custom_nodes.txt /custom_nodes \
    && { python3 -m compileall -q /custom_nodes || true; }


# hadolint ignore=DL3006
FROM ${BASE_IMAGE} AS base

# gcc             TorchCompileModel and nodes with Triton kernels: Triton compiles its launcher (with libc6-dev) at run time
# openssh-server  debugging through a tunnel. start.sh runs it only with PUBLIC_KEY and makes the host key at boot:
#                 the keys that the package makes would be the same, and known, on every machine
# tini            PID 1: hands SIGTERM to start.sh and reaps what nobody waits for
# No ffmpeg: ComfyUI reads and writes video and audio with PyAV, whose wheel brings FFmpeg's libraries.
# No versions: Debian keeps only the newest of each, and the base image fixes the release.
# hadolint ignore=DL3008
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
        gcc \
        libc6-dev \
        openssh-server \
        tini \
    && rm -rf /var/lib/apt/lists/* /var/cache/apt/* /var/log/* /etc/ssh/ssh_host_* \
    # Docker's Python images have no bytecode of the standard library: 0.1 s of each start.
    && { python3 -m compileall -q "$(python3 -c 'import sysconfig; print(sysconfig.get_path("stdlib"))')" || true; }

# COPY and not bind mounts below: buildah 1.28 does not look at what a mounted file holds, and takes a stale layer.
WORKDIR /opt/worker
# torch with its torchvision, torchaudio and CUDA libraries. CUDA 12.8 asks for a driver from 2025 on and runs on
# Blackwell; CUDA 13.0 for a newer one, and there ComfyUI has its fast fp8 kernels (comfy/quant_ops.py, 0.18.1).
ARG TORCH=torch-cuda-12.8
COPY image/$TORCH.txt image/torch.txt
RUN python3 -m venv /ComfyUI/.venv \
    && /ComfyUI/.venv/bin/pip install --no-cache-dir --no-deps -r image/torch.txt
# Constrained, so that nothing in ComfyUI's requirements moves them.
COPY image/constraints.txt image/
COPY --from=sources /ComfyUI/requirements.txt image/comfyui.txt
RUN /ComfyUI/.venv/bin/pip install --no-cache-dir -c image/torch.txt -c image/constraints.txt -r image/comfyui.txt \
    && /ComfyUI/.venv/bin/pip check

COPY requirements.txt ./
RUN python3 -m venv .venv \
    && .venv/bin/pip install --no-cache-dir --no-deps --require-hashes -r requirements.txt

# What many custom nodes use beside Python: OpenCV needs libgl1 and libglib2.0-0, video nodes the program ffmpeg. 470 MB,
# so only where there are custom nodes.
ARG CUSTOM_NODE_PACKAGES="ffmpeg libgl1 libglib2.0-0"
COPY image/custom_nodes.sh image/
COPY --from=sources /custom_nodes /ComfyUI/custom_nodes
# hadolint ignore=DL3008,SC2086
RUN if [ -n "$(ls -A /ComfyUI/custom_nodes)" ]; then \
        apt-get update \
        && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends $CUSTOM_NODE_PACKAGES \
        && rm -rf /var/lib/apt/lists/* /var/cache/apt/* /var/log/* \
        && image/custom_nodes.sh install /ComfyUI/custom_nodes -c image/torch.txt -c image/constraints.txt; \
    fi
COPY --from=sources /ComfyUI /ComfyUI
RUN image/custom_nodes.sh check /ComfyUI
COPY --chmod=755 start.sh ./
COPY rp_handler.py utils.py VERSION ./
COPY worker ./worker
RUN .venv/bin/python -m compileall -q rp_handler.py utils.py worker

# What CUDA base images set: which devices the host's container runtime mounts, and what of its driver.
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
LABEL org.opencontainers.image.title="comfy-endpoint" \
      org.opencontainers.image.description="ComfyUI workflows on RunPod, as a serverless worker or as a pod" \
      org.opencontainers.image.licenses="MIT AND GPL-3.0-or-later"
# SSH. ComfyUI listens on 127.0.0.1 only.
EXPOSE 22
# ComfyUI answers. RunPod looks at pings instead. The start period covers a start that downloads models (BOOT_TIMEOUT_S).
HEALTHCHECK --interval=30s --timeout=10s --start-period=30m --retries=3 \
    CMD ["bash", "-c", "source /opt/worker/start.sh && is_healthy"]
ENTRYPOINT ["tini", "--", "/opt/worker/start.sh"]


# The same with models, in a layer of their own. The token is a build secret: it is in no layer and no history. Without
# MODELS this is the base.
# type=secret: BuildKit and buildah have it.
FROM base AS baked
ARG MODELS=
ARG HF_ENDPOINT=https://huggingface.co
RUN --mount=type=secret,id=HF_TOKEN \
    if [ -f /run/secrets/HF_TOKEN ]; then HF_TOKEN=$(cat /run/secrets/HF_TOKEN); export HF_TOKEN; fi \
    && .venv/bin/python utils.py \
    && rm -rf /root/.cache
