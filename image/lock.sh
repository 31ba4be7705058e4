#!/usr/bin/env bash
# usage: image/lock.sh COMFYUI_DIR DATE   writes what the image installs for that ComfyUI: torch-*.txt and constraints.txt
#
# Packages as of DATE, some days after that ComfyUI's release (v0.18.1: 2026-03-25): what its authors ran it with;
# comfy-kitchen, comfy-aimdo and transformers move fast. Needs uv, which shows with it that everything resolves.
set -Eeuo pipefail

# usage: compile OPTION...   requirements from stdin, pins to stdout
compile() {
    printf '# image/lock.sh, packages as of %s\n' "$date"
    # The newest Pillow: it opens what callers send.
    uv pip compile --quiet --python-version 3.12 --python-platform x86_64-manylinux_2_28 --no-header --no-annotate \
        --exclude-newer "$date" --exclude-newer-package "pillow=$(date +%F)" "$@" -
}

requirements=$(realpath -- "$1")/requirements.txt date=$2
cd -- "$(dirname -- "${BASH_SOURCE[0]}")"
# torchvision and torchaudio are built for one torch.
compile <<<$'torch==2.10.0\ntorchvision==0.25.0\ntorchaudio==2.10.0' >torch-cuda-12.8.txt
compile <<<$'torch==2.11.0\ntorchvision==0.26.0\ntorchaudio==2.11.0' >torch-cuda-13.0.txt
# The rest goes with both, and leaves out what each ComfyUI pins for itself, so that a near version can be built as well.
mapfile -t left_out < <(grep -ohE '^[a-z0-9-]+==' torch-cuda-*.txt | tr -d = | sort -u)
compile --constraints torch-cuda-12.8.txt "${left_out[@]/#/--no-emit-package=}" <"$requirements" |
    grep -v '^comfyui-' >constraints.txt
compile --constraints torch-cuda-13.0.txt --constraints constraints.txt <"$requirements" >/dev/null
