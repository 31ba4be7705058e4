#!/usr/bin/env bash
# usage: tests/image/deps.sh   what the image test needs, from the packages of Debian or Ubuntu; needs root
set -Eeuo pipefail

# usage: die MESSAGE...
die() {
    printf 'ERROR: %s\n' "$*" >&2
    exit 1
}

# program or file, and the package that has it
needed=(
    podman podman
    runc runc # crun, podman's own choice, does not start under some kernels
    mmdebstrap mmdebstrap
    /usr/share/keyrings/debian-archive-keyring.gpg debian-archive-keyring
    ssh openssh-client
    git git
)
missing=()
for ((i = 0; i < ${#needed[@]}; i += 2)); do
    [[ ${needed[i]} == /* && -e ${needed[i]} ]] || command -v -- "${needed[i]}" >/dev/null || missing+=("${needed[i + 1]}")
done
if ((${#missing[@]} > 0)); then
    command -v apt-get >/dev/null || die "There is no apt-get here; install ${missing[*]} by hand."
    [[ $EUID == 0 ]] || die "${missing[*]} must be installed; run make image-deps as root."
    echo "Installing ${missing[*]} ..." >&2
    log_file=$(mktemp)
    trap 'rm -f -- "$log_file"' EXIT
    { apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y "${missing[@]}"; } >"$log_file" 2>&1 ||
        die "No container engine can be had here; apt-get says: $(grep '^E:' "$log_file" | head -n 1)"
fi
