#!/usr/bin/env bash
# start.sh - entrypoint of the image, and of every local run: RAM disk, SSH, models, ComfyUI, handler; then it
# supervises them. Every path comes from the environment (docs/configuration.md), so the same script boots the container,
# the tests and a checkout of your own. It changes nothing below COMFYUI_DIR but the models that MODELS asks for.
# Exit codes: 0 stopped by SIGTERM, 1 something died for good, 2 a setting is wrong, else the handler's own.
set -Eeuo pipefail

WORKER_DIR=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
comfyui_pid='' handler_pid='' sshd_pid='' models_pid=''
generation=0 log_start=1 deaths=0 stopping=0

# usage: log LEVEL MESSAGE...
log() {
    local level=$1
    shift
    printf '%(%H:%M:%S)T %s start.sh %s\n' -1 "$level" "$*" >&2
}

# usage: die EXIT_CODE MESSAGE...   one sentence that says what to set or do
die() {
    local code=$1
    shift
    log ERROR "$*"
    exit "$code"
}

# usage: is_main   false in a background shell, which has our traps until it has got its program: a signal may come before
is_main() {
    [[ $BASHPID == "$$" ]]
}

# usage: uptime_s   whole seconds since the machine was started; bash's SECONDS jumps with the wall clock
uptime_s() {
    local uptime
    read -r uptime _ </proc/uptime
    printf '%s' "${uptime%.*}"
}

# usage: setup_environment   defaults, and refusal of what cannot work; exports what the handler reads
setup_environment() {
    : "${COMFYUI_DIR:=/ComfyUI}" "${COMFYUI_PORT:=8188}" "${COMFYUI_ARGS:=}" "${COMFYUI_LOG:=boot}"
    : "${COMFYUI_PYTHON:=$COMFYUI_DIR/.venv/bin/python}" "${WORKER_PYTHON:=$WORKER_DIR/.venv/bin/python}"
    : "${COMFYUI_MAX_DEATHS:=3}" "${RAMDISK_DIR:=/dev/shm/comfyui}" "${RAMDISK_MIN_MB:=256}" "${API_NODES:=0}"
    : "${MODELS:=}" "${MODELS_FILE:=}" "${VOLUME_DIRS:=/runpod-volume:/workspace}" "${PREFETCH_FRACTION:=0.5}"
    : "${PUBLIC_KEY:=}" "${SSH_PORT:=22}" "${SSH_DIR:=/run/comfy-endpoint-ssh}"
    : "${SSH_PERMIT_OPEN:=127.0.0.1:$COMFYUI_PORT}"
    if [[ -z ${MODE:-} ]]; then
        if [[ -n ${RUNPOD_WEBHOOK_GET_JOB:-} ]]; then MODE=serverless; else MODE=pod; fi
    fi
    if [[ $MODE == serverless ]]; then : "${REQUIRE_GPU:=1}"; else : "${REQUIRE_GPU:=0}"; fi
    local name
    for name in COMFYUI_DIR COMFYUI_PYTHON WORKER_PYTHON RAMDISK_DIR; do # a relative path would mean another after cd
        [[ ${!name} != */* || ${!name} == /* ]] || printf -v "$name" '%s/%s' "$PWD" "${!name}"
    done
    export COMFYUI_DIR COMFYUI_PORT RAMDISK_DIR MODELS MODELS_FILE VOLUME_DIRS PREFETCH_FRACTION REQUIRE_GPU
    ulimit -c 0 # a crash must not write a job's memory to a disk
    # Our own checks say what is wrong; the SDK's would end the worker over a full model disk or a closed network.
    export RUNPOD_SKIP_AUTO_SYSTEM_CHECKS=true RUNPOD_SKIP_GPU_CHECK=true
    # At its default, DEBUG, the SDK logs results and progress (runpod 1.12.0).
    export RUNPOD_LOG_LEVEL=${RUNPOD_LOG_LEVEL:-INFO}
    if [[ ! ${RUNPOD_LOG_LEVEL^^} =~ ^(INFO|WARN|ERROR|NOTSET)$ ]]; then
        log WARNING "RUNPOD_LOG_LEVEL=$RUNPOD_LOG_LEVEL is taken as INFO; below that, RunPod's SDK logs results."
        RUNPOD_LOG_LEVEL=INFO
    fi

    ((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] >= 501)) || die 2 "bash is older than 5.1; its wait cannot supervise."
    [[ $MODE == serverless || $MODE == pod ]] || die 2 "MODE is '$MODE'; set it to serverless or pod."
    for name in COMFYUI_PORT COMFYUI_MAX_DEATHS RAMDISK_MIN_MB SSH_PORT; do
        [[ ${!name} =~ ^(0|[1-9][0-9]{0,8})$ ]] || die 2 "$name is '${!name}'; set it to a whole number."
    done
    for name in COMFYUI_PORT SSH_PORT; do
        ((${!name} >= 1 && ${!name} <= 65535)) || die 2 "$name is ${!name}; set it to a port, 1 to 65535."
    done
    for name in REQUIRE_GPU API_NODES; do
        [[ ${!name} == [01] ]] || die 2 "$name is '${!name}'; set it to 0 or 1."
    done
    [[ $COMFYUI_LOG == boot || $COMFYUI_LOG == stdout ]] || die 2 "COMFYUI_LOG is '$COMFYUI_LOG'; set it to boot or stdout."
    local address='[][A-Za-z0-9_.*:-]+:([0-9]+|\*)'
    [[ $SSH_PERMIT_OPEN =~ ^(any|$address( $address)*)$ ]] ||
        die 2 "SSH_PERMIT_OPEN is '$SSH_PERMIT_OPEN'; set it to HOST:PORT, several with a blank between, or to any."
    [[ -f $COMFYUI_DIR/main.py ]] || die 2 "There is no ComfyUI in COMFYUI_DIR=$COMFYUI_DIR (no main.py)."
    command -v -- "$COMFYUI_PYTHON" >/dev/null || die 2 "COMFYUI_PYTHON=$COMFYUI_PYTHON is no program."
    command -v -- "$WORKER_PYTHON" >/dev/null || die 2 "WORKER_PYTHON=$WORKER_PYTHON is no program."
    [[ ! $COMFYUI_ARGS =~ (^|[[:space:]])--(listen|port)($|[[:space:]=]) ]] ||
        die 2 "COMFYUI_ARGS has --listen or --port; ComfyUI binds 127.0.0.1 only, and its port is COMFYUI_PORT."
    ! is_listening || die 2 "Port $COMFYUI_PORT is taken by another program; set COMFYUI_PORT to a free one."
}

# usage: is_listening   true when something accepts connections on ComfyUI's port
is_listening() {
    (exec 3<>"/dev/tcp/127.0.0.1/$COMFYUI_PORT") 2>/dev/null
}

# usage: is_healthy   for the HEALTHCHECK, whose timeout ends it where even the connection hangs
is_healthy() {
    local status
    exec 3<>"/dev/tcp/127.0.0.1/${COMFYUI_PORT:-8188}" || return 1
    printf 'GET /system_stats HTTP/1.0\r\n\r\n' >&3
    read -rt 5 status <&3 || return 1
    [[ $status == "HTTP/1."?" 200 "* ]]
}

# usage: claim_ramdisk   the directories, the marker without which nothing is ever wiped, and a lock
claim_ramdisk() {
    local marker=$RAMDISK_DIR/.comfy-endpoint-ramdisk
    if [[ -e $RAMDISK_DIR && ! -e $marker && -n $(ls -A -- "$RAMDISK_DIR") ]]; then
        die 2 "RAMDISK_DIR=$RAMDISK_DIR holds files that are not ours; set it to a directory of its own."
    fi
    (umask 077 && mkdir -p -- "$RAMDISK_DIR" && echo comfy-endpoint >"$marker" &&
        mkdir -p -- "$RAMDISK_DIR"/{input,output,temp,run,user}) 2>/dev/null ||
        die 1 "RAMDISK_DIR=$RAMDISK_DIR cannot be written; is /dev/shm full or read-only (docker: --shm-size)?"
    exec 9<"$marker"
    flock -n 9 || die 2 "Another worker uses RAMDISK_DIR=$RAMDISK_DIR; set it to a directory of its own."
}

# usage: prepare_ramdisk   wipes what a killed worker left behind, and measures
prepare_ramdisk() {
    local free_mb
    if [[ -n $(find "$RAMDISK_DIR"/{input,output,temp,run,user} -mindepth 1 -print -quit) ]]; then
        log WARNING "Wiping what an earlier worker left in $RAMDISK_DIR."
        wipe_ramdisk || die 1 "The leftovers in $RAMDISK_DIR cannot be wiped."
    fi
    free_mb=$(($(stat -f -c '%a * %S' -- "$RAMDISK_DIR") / 1048576))
    log INFO "RAM disk $RAMDISK_DIR: $free_mb MB free."
    ((free_mb >= RAMDISK_MIN_MB)) ||
        log WARNING "The RAM disk has less than RAMDISK_MIN_MB=$RAMDISK_MIN_MB MB; give the container more (docker: --shm-size=1g)."
    [[ $(stat -f -c %T -- "$RAMDISK_DIR") =~ ^(tmpfs|ramfs)$ ]] ||
        log WARNING "$RAMDISK_DIR is not on a RAM disk: inputs and outputs will reach a real disk."
}

# usage: wipe_ramdisk [NAME...]   overwrites and removes everything below these directories, or below all of them
wipe_ramdisk() {
    (cd -- "$WORKER_DIR" && "$WORKER_PYTHON" -m worker.ramdisk "$RAMDISK_DIR" "$@")
}

# usage: start_sshd   only with PUBLIC_KEY: keys only, forwarding to ComfyUI only; a failure is a warning
start_sshd() {
    [[ -n $PUBLIC_KEY ]] || return 0
    local sshd keys fingerprint
    # sshd starts itself again for each connection, and wants to be called by its full path
    if ! sshd=$(PATH=$PATH:/usr/sbin command -v sshd); then
        log WARNING "PUBLIC_KEY is set, but there is no sshd; no SSH."
        return 0
    fi
    keys=$(good_keys)
    if [[ -z $keys ]]; then
        log WARNING "PUBLIC_KEY has no usable key; set it to what ~/.ssh/id_ed25519.pub holds. No SSH."
        return 0
    fi
    if ! { write_ssh_files "$keys" && fingerprint=$(ssh-keygen -l -f "$SSH_DIR/host_key" | cut -d' ' -f2); } 2>/dev/null; then
        log WARNING "The files of sshd cannot be written to SSH_DIR=$SSH_DIR and /run/sshd, or a key in there is broken; no SSH."
        return 0
    fi
    log INFO "SSH on port $SSH_PORT for $(wc -l <<<"$keys") keys, host key $fingerprint."
    # What reads sshd's lines is a child of sshd, so it is none that `supervise` waits for.
    "$sshd" -D -e -f "$SSH_DIR/sshd_config" 2> >(while IFS= read -r line; do log INFO "sshd: ${line%$'\r'}"; done) &
    sshd_pid=$!
}

# usage: good_keys   the lines of PUBLIC_KEY that are keys; says which are not, but not what they hold: it may be a
#                    private key
good_keys() {
    local line number=0
    while IFS= read -r line; do
        number=$((number + 1)) line=${line//$'\r'/}
        [[ ! $line =~ ^[[:space:]]*(#|$) ]] || continue
        if [[ $line == *"BEGIN "*"PRIVATE KEY"* ]]; then
            log WARNING "PUBLIC_KEY has a private key; set it to the .pub file beside it, and make a new key pair."
            break
        elif ssh-keygen -l -f /dev/stdin <<<"$line" >/dev/null 2>&1; then
            printf '%s\n' "$line"
        else
            log WARNING "Line $number of PUBLIC_KEY is no public key; it is left out."
        fi
    done <<<"$PUBLIC_KEY"
}

# usage: write_ssh_files KEYS   keys and configuration; false where any of them cannot be written
write_ssh_files() {
    (umask 077 && mkdir -p -- "$SSH_DIR" /run/sshd && printf '%s\n' "$1" >"$SSH_DIR/authorized_keys") &&
        # Made at boot: a key inside the image would be the same, and known, on every machine.
        { [[ -e $SSH_DIR/host_key ]] || ssh-keygen -q -t ed25519 -N '' -f "$SSH_DIR/host_key"; } &&
        cat >"$SSH_DIR/sshd_config" <<CONFIG
Port $SSH_PORT
HostKey $SSH_DIR/host_key
AuthorizedKeysFile $SSH_DIR/authorized_keys
PidFile none
# The file is ours and private, wherever SSH_DIR lies.
StrictModes no
LoginGraceTime 30
AllowUsers root
PermitRootLogin prohibit-password
AuthenticationMethods publickey
PasswordAuthentication no
KbdInteractiveAuthentication no
AllowTcpForwarding local
PermitOpen $SSH_PERMIT_OPEN
AllowStreamLocalForwarding no
AllowAgentForwarding no
PermitTunnel no
X11Forwarding no
Subsystem sftp internal-sftp
$(session_environment)
CONFIG
}

# usage: session_environment   for sshd_config: what utils.py reads, for people who come by SSH, but no token
session_environment() {
    local name value settings='' MODELS=$MODELS
    MODELS=$(printf %s "$MODELS" | sed -E 's/(^|[[:space:]])#.*//' | tr '\r\n' ,) # it may have lines, and comments
    MODELS=${MODELS%,}
    for name in COMFYUI_DIR RAMDISK_DIR VOLUME_DIRS MODELS_FILE MODELS DOWNLOAD_TO HOST_CACHE_DIR \
        HF_ENDPOINT HF_HUB_OFFLINE HF_HOME HF_HUB_CACHE; do
        [[ -n ${!name:-} ]] || continue
        value=${!name}
        [[ $value == *[\"\\$'\r\n']* ]] || settings+=" \"$name=$value\""
    done
    printf 'SetEnv%s' "$settings" # sshd takes only the first line of them
}

# usage: note FILE WORD...   one line for the handler, which must never read half of it; false on a full RAM disk
note() {
    local file=$RAMDISK_DIR/run/$1
    shift
    { printf '%s\n' "$*" >"$file.part" && mv -- "$file.part" "$file"; } 2>/dev/null
}

# usage: start_models   links at once what needs no network; downloads the rest beside ComfyUI's boot, and reads what is
#                       there into memory meanwhile
start_models() {
    write_model_paths || log WARNING "ComfyUI is not told of the models on network volumes: the RAM disk is full."
    if [[ -z $MODELS && -z $MODELS_FILE ]]; then
        touch -- "$RAMDISK_DIR/run/models-settled"
        return 0
    fi
    "$WORKER_PYTHON" "$WORKER_DIR/utils.py" --link-only >&2 || log ERROR "A setting of the models cannot be used (above)."
    "$WORKER_PYTHON" "$WORKER_DIR/utils.py" >&2 &
    models_pid=$!
    if [[ $PREFETCH_FRACTION != 0 ]]; then # no `||`: the shell between would be ended, and not the reader
        "$WORKER_PYTHON" "$WORKER_DIR/utils.py" --prefetch >&2 &
    fi
}

# usage: write_model_paths   for ComfyUI: the folders below VOLUME_DIRS/models, so that files put there by hand are found
write_model_paths() {
    local volume folder number=0 file=$RAMDISK_DIR/run/extra_model_paths.yaml
    # Those that people make later are looked into as well.
    local usual=(checkpoints clip_vision controlnet diffusion_models embeddings loras style_models text_encoders
        upscale_models vae)
    local -A names
    while IFS= read -rd : volume; do
        [[ -z $volume || $volume == /* ]] || volume=$PWD/$volume
        [[ -n $volume && -d $volume/models ]] || continue
        names=()
        for folder in "${usual[@]/#//}" "$volume"/models/*/; do
            folder=${folder%/} folder=${folder##*/}
            # ComfyUI loads code from custom_nodes; two names mean something else there; odd ones would have to be escaped.
            [[ ! $folder =~ ^[A-Za-z0-9_.-]+$ || $folder =~ ^(custom_nodes|configs|base_path|is_default)$ ]] ||
                names[$folder]=1
        done
        printf 'volume_%d:\n  base_path: "%s/models"\n' $((number += 1)) "${volume//[\\\"]/\\&}" >>"$file" || return 1
        for folder in "${!names[@]}"; do # quoted: to YAML, 2024 is a number and "on" is true
            printf '  "%s": "%s"\n' "$folder" "$folder" >>"$file" || return 1
        done
    done <<<"$VOLUME_DIRS:"
}

# usage: on_models_end EXIT_CODE   a missing model refuses the jobs that need it, not the whole worker
on_models_end() {
    models_pid=''
    case $1 in
        0) ;;
        2) log ERROR "A setting of the models cannot be used (above); jobs that need what it names will be refused." ;;
        *) log ERROR "SOME MODELS ARE MISSING (above); jobs that need them will be refused." ;;
    esac
    touch -- "$RAMDISK_DIR/run/models-settled"
}

# usage: has_gpu   whether the container's runtime has given it an NVIDIA GPU (or WSL one), or an AMD one
has_gpu() {
    [[ -e /dev/nvidiactl || -e /dev/dxg || -e /dev/kfd ]]
}

# usage: start_comfyui   on 127.0.0.1 always, with its files on the RAM disk and without the worker's secrets
start_comfyui() {
    local log_file=$RAMDISK_DIR/run/comfyui.log args flag
    read -rd '' -a args <<<"$COMFYUI_ARGS" || true
    args+=( # after COMFYUI_ARGS: of two equal flags argparse takes the last, whatever the first was abbreviated to
        --listen 127.0.0.1 --port "$COMFYUI_PORT" --disable-auto-launch
        --input-directory "$RAMDISK_DIR/input" --output-directory "$RAMDISK_DIR/output"
        --temp-directory "$RAMDISK_DIR" # ComfyUI appends /temp
        --user-directory "$RAMDISK_DIR/user" --database-url sqlite:///:memory:
    )
    if [[ $REQUIRE_GPU == 0 ]] && ! has_gpu; then # a torch for CUDA does not start without
        log INFO "There is no GPU; ComfyUI computes on the processor."
        for flag in "${!args[@]}"; do # argparse takes none of these beside --cpu (cli_args.py, 0.18.1)
            [[ ! ${args[flag]} =~ ^--(gpu-only|highvram|normalvram|lowvram|novram)$ ]] || unset "args[flag]"
        done
        args+=(--cpu)
    fi
    [[ $API_NODES == 1 ]] || args+=(--disable-api-nodes) # a second of boot (0.18.1)
    [[ ! -s $RAMDISK_DIR/run/extra_model_paths.yaml ]] ||
        args+=(--extra-model-paths-config "$RAMDISK_DIR/run/extra_model_paths.yaml")
    touch -- "$log_file"
    log_start=$(($(stat -c %s -- "$log_file") + 1))
    generation=$((generation + 1))
    (
        cd -- "$COMFYUI_DIR"
        unset "${!RUNPOD_@}" "${!BUCKET_@}" "${!AWS_@}" HF_TOKEN HUGGING_FACE_HUB_TOKEN PUBLIC_KEY
        umask 077                                           # it makes its temp directory anew (main.py, 0.18.1)
        export PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 # a checkout is never changed; the log is never late
        # Where memory runs out, the kernel takes ComfyUI before the handler, which can then say so.
        { echo 500 >/proc/self/oom_score_adj; } 2>/dev/null || true
        exec setsid "$COMFYUI_PYTHON" "$WORKER_DIR/worker/launcher.py" main.py "${args[@]}"
    ) >>"$log_file" 2>&1 &
    comfyui_pid=$!
    note comfyui "$comfyui_pid" "$generation" || die 1 "RAMDISK_DIR=$RAMDISK_DIR is full; give the container --shm-size."
    # Ends by itself within a second after ComfyUI.
    tail -c "+$log_start" -f --pid="$comfyui_pid" -- "$log_file" >&2 2>/dev/null &
    watch_boot "$!" &
}

# usage: watch_boot TAIL_PID   lets jobs come when ComfyUI listens; ends the forwarding of its log, unless all is wanted
watch_boot() {
    local started
    started=$(uptime_s)
    until is_listening; do
        kill -0 "$comfyui_pid" 2>/dev/null || return 0
        sleep 0.05
    done
    # Later lines can hold what callers sent: ComfyUI prints the values of refused workflows.
    if [[ $COMFYUI_LOG != stdout ]]; then
        while kill "$1" 2>/dev/null; do sleep 0.01; done
    fi
    log INFO "ComfyUI listens on 127.0.0.1:$COMFYUI_PORT after $(($(uptime_s) - started)) s."
    until note listened "$generation"; do sleep 1; done # only now the handler takes jobs
}

# usage: start_handler   only as a serverless worker
start_handler() {
    [[ $MODE == serverless ]] || return 0
    # What malloc takes for pictures and results goes back to the kernel at once: left to itself, glibc raises this
    # threshold with each large block that is freed, and keeps the later ones.
    (cd -- "$WORKER_DIR" && MALLOC_MMAP_THRESHOLD_=1048576 exec setsid "$WORKER_PYTHON" rp_handler.py) &
    handler_pid=$!
}

# usage: said_of_this_start FILE   true when the note in run/FILE is about the newest start of ComfyUI
said_of_this_start() {
    [[ $(cat -- "$RAMDISK_DIR/run/$1" 2>/dev/null) == "$generation" ]]
}

# usage: on_comfyui_death EXIT_CODE   starts it again, within bounds; a finished job resets the count
on_comfyui_death() {
    local hint=''
    if said_of_this_start last-success; then deaths=0; fi
    note ended "$generation" "$1" || log WARNING "The RAM disk is full; the job is not told ComfyUI's exit code."
    [[ $1 != 137 ]] || hint=' (SIGKILL: out of memory, or killed by the handler)'
    kill_group "$comfyui_pid" # what its nodes have started may hold the GPU
    if said_of_this_start retired; then
        log INFO "Starting ComfyUI anew, as RESTART_COMFYUI asks for after each job."
        start_comfyui
        return
    fi
    log ERROR "ComfyUI ended with code $1$hint."
    if ! said_of_this_start listened; then # else it may hold a caller's words
        tail -c "+$log_start" -- "$RAMDISK_DIR/run/comfyui.log" | tail -n 20 >&2
    fi
    [[ -e $RAMDISK_DIR/run/listened ]] || die 1 "ComfyUI died while booting; the end of its log is above.$(boot_advice)"
    deaths=$((deaths + 1))
    ((deaths < COMFYUI_MAX_DEATHS)) || die 1 "ComfyUI died $deaths times without finishing a job; giving up."
    wipe_ramdisk temp || true # a start of ComfyUI removes what is there, without zeros (main.py, 0.18.1)
    log INFO "Starting ComfyUI again."
    start_comfyui
}

# usage: boot_advice   what to set, where a boot ended with a known message (of torch 2.10, of argparse)
boot_advice() {
    case $(tail -c "+$log_start" -- "$RAMDISK_DIR/run/comfyui.log" | grep . | tail -n 1) in
        *"driver on your system is too old"*)
            printf ' Allow only hosts with a newer CUDA version in the settings of the endpoint.'
            ;;
        *"Found no NVIDIA driver"* | *"No CUDA GPUs are available"* | *"not compiled with CUDA"*)
            if [[ $REQUIRE_GPU == 1 ]]; then
                printf ' It found no GPU: choose one for the endpoint, or set REQUIRE_GPU=0 to compute on the processor.'
            else
                printf ' It cannot use the GPU that is there; set COMFYUI_ARGS=--cpu to compute on the processor.'
            fi
            ;;
        *"main.py: error: "*) printf ' It does not take a flag of COMFYUI_ARGS.' ;;
        *ModuleNotFoundError*) printf ' COMFYUI_PYTHON=%s lacks a package.' "$COMFYUI_PYTHON" ;;
    esac
}

# usage: supervise   returns never: the handler's end is the container's end
supervise() {
    local code
    while true; do
        # Looked for one by one, because bash's `wait -n` never tells of a child that a signal killed while another
        # command ran in the foreground (5.2); it only tells that it is time to look again.
        if has_ended "$handler_pid"; then
            on_handler_end "$code"
        elif has_ended "$comfyui_pid"; then
            on_comfyui_death "$code"
        elif has_ended "$models_pid"; then
            on_models_end "$code"
        elif has_ended "$sshd_pid"; then
            sshd_pid=''
            log WARNING "sshd ended with code $code; no SSH any more."
        else
            wait -n || true
        fi
    done
}

# usage: has_ended PID   true when this child is no more: its exit code is in `code` then; PID may be empty
has_ended() {
    [[ -n $1 ]] && ! kill -0 "$1" 2>/dev/null || return 1
    code=0
    wait "$1" || code=$?
}

# usage: on_handler_end EXIT_CODE   the end of the container, in whatever way
on_handler_end() {
    local code=$1
    ((code != 143 || ! stopping)) || code=0 # it had not yet taken SIGTERM over
    ((code == 0)) || log ERROR "The handler ended with code $code."
    exit "$code"
}

# usage: stop   SIGTERM: a running job is finished and posted first, and ComfyUI supervised until then; SIGINT does not
#               wait for it
stop() {
    is_main || exit 143
    log INFO "Stopping."
    stopping=1
    [[ -n $handler_pid ]] || exit 0
    kill -TERM "$handler_pid" 2>/dev/null || true
}

# usage: clean_up   whatever the way out: no process stays behind and nothing stays on the RAM disk
clean_up() {
    local code=$? deadline
    is_main || exit "$code"
    deadline=$(($(uptime_s) + 5))
    trap '' TERM INT EXIT
    kill_jobs TERM
    while [[ -n $(jobs -rp) ]] && (($(uptime_s) < deadline)); do sleep 0.02; done
    kill_jobs KILL
    # The SDK's ping process outlives a killed handler and would go on telling RunPod that this worker lives.
    kill_group "$handler_pid"
    kill_group "$comfyui_pid"
    if wipe_ramdisk; then rm -rf -- "$RAMDISK_DIR" 2>/dev/null || true; fi # a mount of its own stays, empty
    exit "$code"
}

# usage: kill_jobs SIGNAL   to everything that this script has started and that still runs
kill_jobs() {
    local pid
    for pid in $(jobs -rp); do kill "-$1" "$pid" 2>/dev/null || true; done
}

# usage: kill_group PID   what a process that was started with setsid has left behind; PID may be empty
kill_group() {
    [[ -z $1 ]] || kill -KILL -- "-$1" 2>/dev/null || true
}

_main() {
    setup_environment
    claim_ramdisk
    trap clean_up EXIT
    trap stop TERM
    trap 'exit 130' INT
    log INFO "comfy-endpoint $(<"$WORKER_DIR/VERSION")"
    prepare_ramdisk
    start_sshd
    start_models
    start_comfyui
    start_handler
    supervise
}

if [[ ${BASH_SOURCE[0]} == "$0" ]]; then
    _main "$@"
fi
