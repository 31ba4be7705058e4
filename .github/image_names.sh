#!/usr/bin/env bash
# usage: TORCH=torch-cuda-13.0 [COMFYUI_REF=v0.19.0] .github/image_names.sh   for build-base.yml, outputs of a step:
#        version (of VERSION), image (without a tag), suffix (of each tag). Reads what GitHub sets: GITHUB_REF_TYPE,
#        GITHUB_REF_NAME, GITHUB_REPOSITORY. A tag must be the version that VERSION and CHANGELOG.md name.
set -Eeuo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."

# usage: die MESSAGE...
die() {
    printf 'ERROR: %s\n' "$*" >&2
    exit 1
}

version=$(<VERSION)
if [[ $GITHUB_REF_TYPE == tag ]]; then
    [[ $GITHUB_REF_NAME == "v$version" ]] || die "The tag is $GITHUB_REF_NAME, but VERSION says $version."
    grep -Eq "^## \[${version//./\\.}\] - [0-9]{4}-[0-9]{2}-[0-9]{2}$" CHANGELOG.md ||
        die "CHANGELOG.md has no heading '## [$version] - YYYY-MM-DD'; move what is released there."
fi
[[ -f image/$TORCH.txt ]] || die "There is no image/$TORCH.txt."
[[ ${COMFYUI_REF:=} =~ ^[A-Za-z0-9._/-]*$ ]] || die "COMFYUI_REF is no name of a tag, a branch or a commit."

suffix=''
[[ -z $COMFYUI_REF ]] || suffix=-comfyui-${COMFYUI_REF//\//-}
[[ $TORCH == "$(sed -n 's/^ARG TORCH=//p' Dockerfile)" ]] || suffix+=-${TORCH#torch-}
printf '%s\n' "version=$version" "image=ghcr.io/${GITHUB_REPOSITORY,,}" "suffix=$suffix" # a registry wants lower case
