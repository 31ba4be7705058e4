#!/usr/bin/env bash
# Custom nodes, and the first start of ComfyUI, while the image is built. What fails here fails the build.
#
#   custom_nodes.sh fetch LIST FOLDER          the repositories of LIST (custom_nodes.txt), without their history
#   custom_nodes.sh install FOLDER OPTION...   what they require, with these options of pip, into ComfyUI's environment
#   custom_nodes.sh check COMFYUI_DIR          starts ComfyUI once, without a GPU, and ends it: everything is imported
set -Eeuo pipefail

# usage: die MESSAGE...
die() {
    printf 'ERROR: %s\n' "$*" >&2
    exit 1
}

# usage: fetch LIST FOLDER
fetch() {
    local list=$1 folder=$2 line number=0 repository commit name
    while read -r line || [[ -n $line ]]; do
        number=$((number + 1)) line=${line%%#*} line=${line//[$' \t\r']/}
        [[ -n $line ]] || continue
        [[ $line =~ ^(.+)@([0-9a-f]{40})$ ]] ||
            die "Line $number of custom_nodes.txt is not REPOSITORY@COMMIT with all 40 digits of the commit."
        repository=${BASH_REMATCH[1]} commit=${BASH_REMATCH[2]}
        name=$(basename -- "$repository" .git)
        [[ ! -e $folder/$name ]] || die "custom_nodes.txt has $name twice."
        git init -q "$folder/$name"
        ( # fetch, because clone takes no commit
            cd -- "$folder/$name"
            git fetch -q --depth 1 "$repository" "$commit" || die "$repository has no commit $commit that can be fetched."
            git checkout -q FETCH_HEAD
            git submodule --quiet update --init --recursive --depth 1
            find . -name .git -prune -exec rm -rf {} +
        )
    done <"$list"
}

# usage: install FOLDER OPTION...
install() {
    local node folder=$1
    shift
    for node in "$folder"/*; do
        [[ -f $node/requirements.txt ]] || continue
        /ComfyUI/.venv/bin/pip install --no-cache-dir "$@" -r "$node/requirements.txt" ||
            die "The requirements of $(basename -- "$node") cannot be installed (above)."
    done
}

# usage: check COMFYUI_DIR
check() {
    local data log node imports failed=''
    cd -- "$1"
    data=$(mktemp -d)
    log=$data/log
    TMPDIR=$data PYTHONDONTWRITEBYTECODE=1 "${COMFYUI_PYTHON:-.venv/bin/python}" main.py --cpu --quick-test-for-ci \
        --disable-auto-launch --database-url sqlite:///:memory: --user-directory "$data" --temp-directory "$data" \
        --input-directory "$data" --output-directory "$data" >"$log" 2>&1 || failed='ComfyUI does not start'
    # "IMPORT FAILED: nodes_canny.py": a core node whose package does not fit (nodes.py, 0.18.1)
    ! grep -q '^IMPORT FAILED: ' "$log" || failed=${failed:-"ComfyUI cannot import all of its own nodes"}
    # "   0.1 seconds (IMPORT FAILED): /ComfyUI/custom_nodes/NAME" (nodes.py, 0.18.1). Before that heading stand the same
    # lines about prestartup_script.py.
    imports=$(sed '1,/^Import times for custom nodes:/d' "$log")
    for node in custom_nodes/*/; do
        node=$(basename -- "$node")
        [[ $node != __pycache__ && $node != '*' ]] || continue
        grep -qE "seconds: .*/custom_nodes/$node\$" <<<"$imports" || failed=${failed:-"ComfyUI cannot import $node"}
    done
    [[ -z $failed ]] || cat -- "$log" >&2
    rm -rf -- "$data"
    [[ -z $failed ]] || die "$failed (above)."
}

case ${1:-} in
    fetch | install | check) "$@" ;;
    *) die "usage: custom_nodes.sh fetch LIST FOLDER | install FOLDER OPTION... | check COMFYUI_DIR" ;;
esac
