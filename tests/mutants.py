"""Take out one safeguard at a time, in a copy of the tree: a test must turn red each time.

    make mutants                 all of them
    python -m tests.mutants wipe those whose name contains "wipe"

A mutant that survives means that the tests would not notice if somebody removed that safeguard. Exit code 1 then.
"""

import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
AT_ONCE = 4  # copies of the tree; the tests mostly wait
TESTS_FAILED = 1  # pytest's exit code; 2 to 5 mean that the tests could not run at all


class Mutant(NamedTuple):
    """Replacing ``old`` by ``new``, once, in ``file`` must fail ``tests`` (pytest arguments)."""

    name: str
    file: str
    old: str
    new: str
    tests: str


MAIN = "tests/process/test_main_job.py"
STOPPING = "tests/process/test_stopping.py"
COMFYUI = "tests/process/test_faults_comfyui.py"
WEBSOCKET = "tests/process/test_faults_websocket.py"
PLATFORM = "tests/process/test_faults_platform.py"
URLS = "tests/process/test_faults_urls.py"
HTTPS_URL = "tests/unit/test_https_url.py"
OUTPUTS = "tests/process/test_faults_outputs.py"
RAMDISK = "tests/process/test_faults_ramdisk.py"
PRIVACY = "tests/process/test_privacy.py"
PAYLOAD = "tests/process/test_faults_payload.py"
RESULTS = "tests/process/test_faults_results.py"
START_SH = "tests/process/test_start_sh.py"
CUSTOM_NODES = "tests/process/test_custom_nodes.py"

MUTANTS = [
    Mutant("nonce", "worker/run.py", ", NONCE_INPUT: nonce}", "}", f"{MAIN} -k word_for_word"),
    Mutant("nonce: a node that refuses it", "worker/run.py", "if kind == \"TypeError\" and NONCE_INPUT in message", "if False and NONCE_INPUT in message", f"{COMFYUI} -k extra_input"),
    Mutant("nonce: files of an earlier job", "worker/run.py", "if stale and self._stale_left:", "if False:", f"{COMFYUI} -k link_from"),
    Mutant("fsync", "worker/ramdisk.py", "os.fsync(stream.fileno())", "pass", "tests/process/test_write_order.py tests/unit/test_ramdisk.py"),
    Mutant("rename", "worker/ramdisk.py", 'f".{secrets.token_hex(8)}.part"', "leaf", "tests/process/test_write_order.py tests/unit/test_ramdisk.py"),
    Mutant("wipe: zeros", "worker/ramdisk.py", "overwrite_with_zeros(entry.name, directory_fd)", "pass", f"{MAIN} -k debug_keeps"),
    Mutant("wipe: after the job", "rp_handler.py", 'with steps("wipe"):\n                    self._wipe()', "pass", f"{MAIN} -k three_jobs"),
    Mutant("wipe: before the job", "rp_handler.py", "self.ramdisk.wipe()\n        if state == ", "if state == ", f"{MAIN} -k debug_keeps"),
    Mutant("wipe: the log", "worker/process.py", "os.truncate(self._log_path, 0)", "pass", f"{MAIN} -k three_jobs"),
    Mutant("wipe: after a failure", "rp_handler.py", "if not request.debug:\n                with", "if not request.debug and sys.exc_info()[0] is None:\n                with", f"{COMFYUI} -k node_that_raises"),
    Mutant("wiped at the start", "start.sh", "        wipe_ramdisk || die", "        true || die", f"{STOPPING} -k killed_worker"),
    Mutant("status is read", "worker/follow.py", "if failure is not None:", "if False:", f"{MAIN} -k cannot_run"),
    Mutant("history is deleted", "rp_handler.py", "self.process.scrub_log, self.comfyui.clear_history)", "self.process.scrub_log)", f"{MAIN} -k three_jobs"),
    Mutant("history retries", "worker/follow.py", "HISTORY_WAITS_S = (0.010, 0.050, 0.250, 1.250, 6.250)", "HISTORY_WAITS_S = ()", "tests/unit/test_follow.py"),
    Mutant("websocket: the end without it", "worker/follow.py", "if not feed.is_open or ended_unheard or now - quiet_since >= QUIET_S:", "if False:", f"{WEBSOCKET} -k refused"),
    Mutant("websocket: reopened", "worker/follow.py", "feed.reopen_if_due()", "pass", f"{WEBSOCKET} -k refused"),
    Mutant("websocket: reopened under its name", "worker/feed.py", "            self.open()\n\n    def receive", "            self._url += 'x'\n            self.open()\n\n    def receive", f"{WEBSOCKET} -k opened_again"),
    Mutant("websocket: pictures sent again", "worker/follow.py", "if feed.was_down or not self._terminal_seen:", "if False:", f"{WEBSOCKET} -k only_the_websocket"),
    Mutant("websocket: deep garbage", "worker/feed.py", "except (ValueError, RecursionError):", "except ValueError:", f"{WEBSOCKET} -k garbage"),
    Mutant("deadline and cancellation", "worker/follow.py", "self._control.check()\n            message", "message", f"{PLATFORM} -k own_deadline"),
    Mutant("deadline on a clock of its own", "worker/control.py", "clock: Callable[[], float] = time.monotonic", "clock: Callable[[], float] = time.time", f"{PLATFORM} -k wall_clock"),
    Mutant("deadline while the POST is not answered", "worker/comfyui_server.py", "                self._check()\n            except (JobTimeout", "                pass\n            except (JobTimeout", f"{COMFYUI} -k post_that"),
    Mutant("interrupt", "worker/follow.py", "self._stop()\n            raise", "raise", f"{PLATFORM} -k own_deadline"),
    Mutant("interrupt: cancelled", "worker/follow.py", "except (JobTimeout, JobCancelled):", "except JobTimeout:", f"{PLATFORM} -k platforms_deadline"),
    Mutant("killed after the grace", "worker/follow.py", "                self._server.end()", "                pass", f"{COMFYUI} -k let_go"),
    Mutant("shielded thread", "rp_handler.py", "control.cancel()", "pass", f"{PLATFORM} -k makes_way"),
    Mutant("shielded thread: cancelled twice", "rp_handler.py", "while not work.done():", "if not work.done():", f"{PLATFORM} -k cancelled_twice"),
    Mutant("crash is seen", "worker/follow.py", "self._server.raise_if_dead()  #", "pass  #", "tests/unit/test_follow.py -k restart"),
    Mutant("hung is told from slow", "worker/comfyui_server.py", "if used_s - self._cpu_s > IDLE_CPU_S:", "if False:", "tests/unit/test_comfyui_answers.py -k only_slow"),
    Mutant("a dead prompt worker ends ComfyUI", "worker/launcher.py", "os._exit(EXIT_CODE)", "pass", f"{COMFYUI} -k prompt_worker_died"),
    Mutant("out of memory is told from killed", "worker/process.py", "out_of_memory = _oom_kills(counter) > before", "pass", "tests/unit/test_process.py -k count_of_kills"),
    Mutant("memory is freed after a run that had too little", "worker/run.py", "comfyui.free_memory()  # for the next job", "pass", f"{COMFYUI} -k too_little"),
    Mutant("memory is freed: the cache too", "worker/comfyui.py", '"free_memory": True', '"free_memory": False', f"{COMFYUI} -k too_little"),
    Mutant("queue is cleared", "rp_handler.py", "not self.comfyui.clear_queue(self.config.interrupt_grace_s)", "False", f"{COMFYUI} -k leftover"),
    Mutant("secrets are masked", "worker/comfyui_errors.py", 'text = text.replace(word, "***")', "pass", f"{COMFYUI} -k no_secret"),
    Mutant("output: cut short", "worker/outputs.py", "if is_cut_short(data) and", "if False and", f"{COMFYUI} -k not_whole"),
    Mutant("output: a model or latent that is cut short", "worker/media.py", 'if data.startswith(b"glTF"):', "if False:", f"{OUTPUTS} -k not_whole"),
    Mutant("output: each file once", "worker/outputs.py", "found.setdefault(output.path, output)", "found[str(len(found))] = output", f"{OUTPUTS} -k comes_back_once"),
    Mutant("output: named by its path", "worker/outputs.py", "named += _named_by_path(outcome, ramdisk)", "pass", f"{OUTPUTS} -k only_a_path"),
    Mutant("output: a shown model is made again", "worker/run.py", "if lost and self._files_left and", "if False and", f"{OUTPUTS} -k only_a_path"),
    Mutant("output: the media type is the content's", "worker/media_types.py", "if head.startswith(signature, offset):", "if False:", f"{OUTPUTS} -k media_type"),
    Mutant("re-encoding: the deadline", "worker/reencode.py", "            check()\n", "            pass\n", f"{OUTPUTS} -k ends_at_the_deadline"),
    Mutant("re-encoding: flattened on white", "worker/reencode.py", 'image.size, "white")', 'image.size, "black")', f"{OUTPUTS} -k alpha"),
    Mutant("re-encoding: frames keep their times", "worker/reencode.py", "frame.load()  #", "pass  #", "tests/unit/test_reencode.py -k frames"),
    Mutant("re-encoding: what Pillow cannot read", "worker/reencode.py", "except (*DAMAGE, MemoryError) as error:", "except MemoryError as error:", f"{OUTPUTS} -k cannot_be_re_encoded"),
    Mutant("SIGTERM while idle", "rp_handler.py", "number, self.leave)", "number, lambda: None)", f"{PLATFORM} -k idle_worker"),
    Mutant("SIGTERM: ComfyUI is supervised on", "start.sh", 'elif has_ended "$comfyui_pid"; then', 'elif ((!stopping)) && has_ended "$comfyui_pid"; then', f"{PLATFORM} -k after_sigterm"),
    Mutant("a dead sshd is a warning", "start.sh", "sshd_pid=''\n            log WARNING", "die 1", f"{PLATFORM} -k sshd"),
    Mutant("progress", "rp_handler.py", "self._newest = progress", "pass", f"{MAIN} -k progress"),
    Mutant("progress: not too often", "rp_handler.py", "PROGRESS_INTERVAL_S = 1.0", "PROGRESS_INTERVAL_S = 0.05", f"{PLATFORM} -k burst"),
    Mutant("loaders: before ComfyUI is asked", "rp_handler.py", "*check_before_run(request.workflow, names, self.comfyui)", "", f"{PAYLOAD} -k not_sent"),
    Mutant("loaders: outside", "worker/workflow_checks.py", "if _leaves(file.path)]", "if False]", f"{PAYLOAD} -k nothing_needs"),
    Mutant("loaders: those that nothing needs", "worker/workflow_checks.py", "for file in missing if file.node_id in needed]", "for file in missing]", f"{PAYLOAD} -k nothing_needs"),
    Mutant("loaders: wrapped values", "worker/workflow_checks.py", 'value = value.get("__value__", value)', "value = {}", f"{PAYLOAD} -k not_sent"),
    Mutant("links to nowhere", "worker/workflow_checks.py", "if loose := sorted(lost & needed):", "if loose := []:", f"{PAYLOAD} -k link_to_a_node"),
    Mutant("chains", "worker/payload.py", "    check_chain(workflow)\n", "", f"{PAYLOAD} -k chain"),
    Mutant("prefixes", "worker/payload.py", "    check_save_paths(workflow)\n", "", f"{PAYLOAD} -k prefix"),
    Mutant("nesting", "worker/payload.py", "    _refuse_deep_nesting(job_input)\n", "", f"{PAYLOAD} -k thousand_levels"),
    Mutant("nesting: the SDK", "rp_handler.py", "    sys.setrecursionlimit(JSON_NESTING)\n", "", f"{PAYLOAD} -k thousand_levels"),
    Mutant("classes", "worker/payload.py", "> MAX_CLASSES:", "> 10**9:", "tests/unit/test_payload.py -k one_sentence"),
    Mutant("bombs", "worker/media.py", "    except Image.DecompressionBombError:", "    except ZeroDivisionError:", f"{PAYLOAD} -k bomb"),
    Mutant("a flipped byte", "worker/media.py", "if zlib.crc32(view[position + 4 : body_end]) !=", "if zlib.crc32(b'') ==", f"{PAYLOAD} -k flipped"),
    Mutant("size limit", "worker/delivery.py", "elif body_bytes > self.limit_bytes:", "elif False:", "tests/unit/test_delivery.py"),
    Mutant("size limit: all that is posted", "rp_handler.py", '"timings_ms": WIDEST_TIMINGS_MS,', "", f"{RESULTS} -k just_under"),
    Mutant("size limit: texts beside links", "worker/delivery.py", "self._check_without_files(result, \"files go into the bucket, but texts do not; ask for less text\")", "pass", f"{RESULTS} -k texts_too"),
    Mutant("size limit: failures", "worker/delivery.py", "if posted_bytes(failure) <= limit_bytes:", "if True:", f"{RESULTS} -k posted_is_cut"),
    Mutant("loaders: linked names", "worker/workflow_checks.py", "if workflow[source][\"class_type\"] not in _CONSTANTS:", "if True:", f"{PAYLOAD} -k not_sent"),
    Mutant("loaders: names that are computed", "worker/workflow_checks.py", "            if known:\n", "            if False:\n", "tests/unit/test_workflow_checks.py"),
    Mutant("wipe: holes of a sparse file", "worker/ramdisk.py", "in _data_of(file_fd, status.st_size):", "in [(0, status.st_size)]:", f"{RAMDISK} -k sparse"),
    Mutant("memory: inputs are let go of", "rp_handler.py", "job_input.clear()", "pass", "tests/process/test_memory.py"),
    Mutant("memory: what is freed goes back", "start.sh", "MALLOC_MMAP_THRESHOLD_=1048576 exec", "exec", "tests/process/test_memory.py"),
    Mutant("bucket: several at a time", "worker/bucket.py", "PARALLEL_UPLOADS = 4", "PARALLEL_UPLOADS = 1", f"{RESULTS} -k several_files"),
    Mutant("bucket: sent again", "worker/bucket.py", 'if wait_s is None or not failure.details["retried"]:', "if True:", f"{RESULTS} -k fails_twice"),
    Mutant("bucket: refusals are final", "worker/bucket.py", 'not failure.details["retried"]:', "False:", f"{RESULTS} -k does_not_exist"),
    Mutant("bucket: deadline and cancellation", "worker/bucket.py", "                control.check()\n", "", f"{RESULTS} -k up_the_deadline"),
    Mutant("bucket: keys stay out of the log", "rp_handler.py", "level=logging.WARNING, format=form", "level=level, format=form", f"{RESULTS} -k several_files"),
    Mutant("input check", "worker/payload.py", "check_image(image.name, image.data)", "pass", f"{MAIN} -k cannot_run"),
    Mutant("URLs: off unless set", "worker/input_files.py", "if not allow_urls:", "if False:", f"{URLS} -k unless_the_worker"),
    Mutant("URLs: IPv6 forms of private addresses", "worker/https_url.py", "parsed not in _GLOBAL_UNICAST", "False", HTTPS_URL),
    Mutant("URLs: addresses in odd forms", "worker/https_url.py", "match is None or not _host_is_valid(match[\"host\"])", "match is None", HTTPS_URL),
    Mutant("URLs: public addresses only", "worker/fetch.py", "if not all(is_public(address) for _, address in answers):", "if False:", f"{URLS} -k not_public"),
    Mutant("URLs: all addresses public", "worker/fetch.py", "if not all(is_public", "if not any(is_public", f"{URLS} -k not_public"),
    Mutant("URLs: redirects, too", "worker/fetch.py", "allow_redirects=False", "allow_redirects=True", f"{URLS} -k same_rules"),
    Mutant("URLs: one look-up", "worker/fetch.py", "resolver=_Known(await self._look_up())", "resolver=aiohttp.ThreadedResolver() if await self._look_up() else None", f"{URLS} -k was_checked"),
    Mutant("URLs: certificate", "worker/fetch.py", "ssl=_trusted(), force_close", "ssl=False, force_close", f"{URLS} -k certificate"),
    Mutant("URLs: no proxy", "worker/fetch.py", "trust_env=False", "trust_env=True", f"{URLS} -k nothing_else_is_told"),
    Mutant("URLs: letter for letter", "worker/fetch.py", "URL(str(self._url), encoded=True)", "URL(str(self._url))", f"{URLS} -k nothing_else_is_told"),
    Mutant("URLs: size", "worker/fetch.py", "self._check_size(received_bytes)", "pass", f"{URLS} -k above_the_limit"),
    Mutant("URLs: time", "worker/fetch.py", "asyncio.timeout_at(deadline)", "asyncio.timeout_at(None)", f"{URLS} -k keeps_one_waiting"),
    Mutant("URLs: deadline and cancellation", "worker/fetch.py", "control.check()", "pass", f"{URLS} -k past_its_deadline"),
    Mutant("URLs: content", "worker/fetch.py", "if self._is_image:", "if False:", f"{URLS} -k no_whole_picture"),
    Mutant("secrets stay out of ComfyUI", "start.sh", '        unset "${!RUNPOD_@}"', '        : "${!RUNPOD_@}"', "tests/process/test_start_sh.py -k secret"),
    Mutant("RAM disk: full during the run", "worker/comfyui_errors.py", 'if (full := _NO_SPACE.search(message)) and', "if (full := None) and", f"{RAMDISK} -k while_comfyui_saves"),
    Mutant("RAM disk: marker", "worker/ramdisk.py", "if not stat.S_ISREG(os.stat(MARKER, dir_fd=root_fd, follow_symlinks=False).st_mode):", "if False:", f"{RAMDISK} -k marker_file"),
    Mutant("RAM disk: an output that is a symlink", "worker/ramdisk.py", "flags = os.O_RDONLY | os.O_NOFOLLOW", "flags = os.O_RDONLY", f"{RAMDISK} -k output_that_is_no_file"),
    Mutant("RAM disk: hard links", "worker/ramdisk.py", " or status.st_nlink != 1", "", f"{RAMDISK} -k another_name"),
    Mutant("RAM disk: too small", "start.sh", "((free_mb >= RAMDISK_MIN_MB))", "true", f"{RAMDISK} -k small_is"),
    Mutant("RAM disk: a mount of its own", "start.sh", 'rm -rf -- "$RAMDISK_DIR" 2>/dev/null || true', 'rm -rf -- "$RAMDISK_DIR"', f"{RAMDISK} -k small_is"),
    Mutant("wipe: temp before the next start", "start.sh", "wipe_ramdisk temp || true", "true", f"{PRIVACY} -k previews"),
    Mutant("logs: what Pillow reads", "rp_handler.py", "level=logging.WARNING, format=form", "level=level, format=form", f"{PRIVACY} -k mixed"),
    Mutant("logs: results", "start.sh", "        RUNPOD_LOG_LEVEL=INFO\n", "", f"{PRIVACY} -k mixed"),
    Mutant("no core file", "start.sh", "ulimit -c 0", "true", f"{PRIVACY} -k core"),
    Mutant("restart after each job", "rp_handler.py", "self.process.retire(self.server.state)", "pass", f"{PRIVACY} -k restarted_after"),
    Mutant("restart after each job that ran", "rp_handler.py", "if ran and self", "if self", f"{PRIVACY} -k does_not_reach"),
    Mutant("output: beside a picture of the same name by websocket", "worker/outputs.py", 'kind="websocket", data=data', "data=data", "tests/unit/test_outputs.py -k same_name"),
    Mutant("restart after each job is no death", "start.sh", "if said_of_this_start retired; then", "if false; then", f"{PRIVACY} -k restarted_after"),
    Mutant("restart after a job with debug", "rp_handler.py", "if state == self._kept:", "if False:", f"{PRIVACY} -k puts_the_restart_off"),
    Mutant("loopback only", "start.sh", "--listen 127.0.0.1", "--listen 0.0.0.0", f"{PRIVACY} -k namespace"),
    Mutant("checkout unchanged", "start.sh", "PYTHONDONTWRITEBYTECODE=1", "NOTHING=1", "tests/process/test_start_sh.py -k byte_identical"),
    Mutant("client: the other role's text stays", "client.py", "own = list(dict.fromkeys(text for text in texts if not text & others))", "own = list(dict.fromkeys(texts))", "tests/unit/test_client_gallery.py"),
    Mutant("client: zeroed conditioning ends a text", "client.py", 'ENDS_TEXT = frozenset({"ConditioningZeroOut"})', "ENDS_TEXT = frozenset()", "tests/unit/test_client_gallery.py"),
    Mutant("client: linked inputs stay", "client.py", 'names = ["image"] if not is_linked(inputs.get("image")) else []', 'names = ["image"]', "tests/unit/test_client_gallery.py"),
    Mutant("client: node ids in natural order", "client.py", "return sorted(workflow, key=natural_key)", "return sorted(workflow)", "tests/unit/test_client_gallery.py"),
    Mutant("client: a number that is not a seed's alone stays", "client.py", "if place.input_name in SEED_INPUTS or place not in shared)", "if True)", "tests/unit/test_client_gallery.py"),
    Mutant("client: pictures upright", "client.py", "if image.getexif().get(ORIENTATION) in range(2, 9):", "if False:", "tests/unit/test_client_files.py"),
    Mutant("client: sent again only after 429", "client.py", "if not error.busy:\n                    raise PlatformError", "if False:\n                    raise PlatformError", "tests/unit/test_client_endpoint.py"),
    Mutant("client: the deadline cancels", "client.py", "except (KeyboardInterrupt, JobTimedOut):", "except KeyboardInterrupt:", "tests/unit/test_client_cli.py"),
    Mutant("client: Ctrl-C cancels", "client.py", "except (KeyboardInterrupt, JobTimedOut):", "except JobTimedOut:", "tests/unit/test_client_cli.py"),
    Mutant("client: a computer that slept", "client.py", "self._slept_s += late_s", "pass", "tests/unit/test_client_endpoint.py"),
    Mutant("client: completed without output is a failure", "client.py", "if not isinstance(output, dict) or not output:", "if False:", "tests/unit/test_client_endpoint.py"),
    Mutant("client: no file is overwritten", "client.py", 'path.open("xb").close()', 'path.open("wb").close()', "tests/unit/test_client_saving.py"),
    Mutant("client: a file appears whole", "client.py", "partial.unlink()", "pass", "tests/unit/test_client_saving.py"),
    Mutant("client: the key stays with the endpoint", "client.py", 'request.headers["Authorization"] = f"Bearer {key}"', 'request.headers["X-Key"] = f"Bearer {key}"', "tests/unit/test_client_endpoint.py"),
    Mutant("client: a batch goes on where it ended", "client.py", "if self._done and (saved := self._done.get(task.key)) is not None:", "if False:", "tests/unit/test_client_many.py"),
    Mutant("client: Ctrl-C ends the rest", "client.py", "server.sleep(0)  #", "#", "tests/unit/test_client_many.py"),
    Mutant("client: glass box, fresh files", "client.py", "self.NONCE_INPUT), nonce) for node_id in fresh]", "self.NONCE_INPUT), nonce) for node_id in ()]", "tests/contract/test_client_glass_box.py"),
    Mutant("client: glass box, an interrupt that gets lost", "client.py", 'self._post("/queue", {"delete": [job_id]})', "pass", "tests/contract/test_client_glass_box.py"),
    Mutant("models: sha256", "worker/models/download.py", "if download.sha256 != download.expected_sha256:", "if False:", "tests/process/test_utils_downloads.py"),
    Mutant("models: one download on a volume", "worker/models/lease.py", 'path.open("x").close()', 'path.open("w").close()', "tests/process/test_utils_downloads.py tests/unit/test_models_lease.py"),
    Mutant("models: a killed holder", "worker/models/lease.py", "if age_s(path) > stale_s:", "if False:", "tests/unit/test_models_lease.py"),
    Mutant("models: orphans", "worker/models/download.py", "            if is_orphan:\n", "            if False:\n", "tests/process/test_utils_downloads.py"),
    Mutant("models: space", "worker/models/download.py", "if download.size_bytes > free:", "if False:", "tests/process/test_utils_downloads.py"),
    Mutant("models: biggest first", "worker/models/download.py", "key=lambda one: -one.size_bytes", "key=lambda one: one.size_bytes", "tests/process/test_utils_downloads.py"),
    Mutant("models: whole by their header", "worker/models/sources.py", "return None if size_bytes == whole_bytes else", "return None if True else", "tests/unit/test_models_sources.py"),
    Mutant("models: SIGTERM ends downloads", "worker/models/download.py", "        stop.set()\n", "", "tests/process/test_utils_downloads.py"),
    Mutant("models: the network volume is given to ComfyUI", "start.sh", "[[ ! -s $RAMDISK_DIR/run/extra_model_paths.yaml ]] ||", "true ||", "tests/process/test_models_boot.py"),
    Mutant("models: the prefetch ends with its share", "worker/models/prefetch.py", "if limit_bytes <= 0:", "if False:", "tests/unit/test_models_prefetch.py tests/process/test_utils_models.py"),
    Mutant("SSH: a line that is no key", "start.sh", 'elif ssh-keygen -l -f /dev/stdin <<<"$line" >/dev/null 2>&1; then', "elif true; then", f"{START_SH} -k named_by_its_number"),
    Mutant("SSH: what a bad line holds is not said", "start.sh", 'log WARNING "Line $number of PUBLIC_KEY is', 'log WARNING "Line $number of PUBLIC_KEY ($line) is', f"{START_SH} -k private_key"),
    Mutant("SSH: a private key is known as one", "start.sh", 'if [[ $line == *"BEGIN "*"PRIVATE KEY"* ]]; then', "if false; then", f"{START_SH} -k private_key"),
    Mutant("SSH: where it may forward to", "start.sh", "PermitOpen $SSH_PERMIT_OPEN", "PermitOpen any", f"{START_SH} -k ssh_forwards"),
    Mutant("SSH: no other setting with where it may forward to", "start.sh", "[[ $SSH_PERMIT_OPEN =~", "true || [[ $SSH_PERMIT_OPEN =~", f"{START_SH} -k no_other_setting"),
    Mutant("SSH: root only", "start.sh", "AllowUsers root\n", "", f"{START_SH} -k only_root"),
    Mutant("SSH: no secret in a session", "start.sh", "HF_ENDPOINT HF_HUB_OFFLINE HF_HOME HF_HUB_CACHE; do", "HF_ENDPOINT HF_HUB_OFFLINE HF_HOME HF_HUB_CACHE HF_TOKEN; do", f"{START_SH} -k ssh_session_knows"),
    Mutant("GPU: required of a serverless worker", "start.sh", ': "${REQUIRE_GPU:=1}"', ': "${REQUIRE_GPU:=0}"', f"{START_SH} -k gpu_is_required"),
    Mutant("GPU: a worker without", "rp_handler.py", "if worker.config.require_gpu and not worker.comfyui.sees_gpu():", "if False:", f"{START_SH} -k takes_no_job"),
    Mutant("GPU: the processor is none", "worker/comfyui.py", 'any(device["type"] != "cpu" for', "any(True for", f"{START_SH} -k takes_no_job"),
    Mutant("GPU: the processor without one", "start.sh", "args+=(--cpu)", "true", f"{START_SH} -k computes_on"),
    Mutant("GPU: never the processor where one is required", "start.sh", "if [[ $REQUIRE_GPU == 0 ]] && ! has_gpu; then", "if ! has_gpu; then", f"{START_SH} -k computes_on"),
    Mutant("boot advice", "start.sh", "is above.$(boot_advice)", "is above.", f"{START_SH} -k what_to_do"),
    Mutant("boot advice: of this start", "start.sh", 'case $(tail -c "+$log_start"', "case $(tail -c +1", f"{START_SH} -k last_start_but_one"),
    Mutant("health check: the status", "start.sh", '[[ $status == "HTTP/1."?" 200 "* ]]', "[[ -n $status ]]", f"{START_SH} -k health_is"),
    Mutant("health check: its deadline", "start.sh", "read -rt 5 status", "read -r status", f"{START_SH} -k does_not_answer"),
    Mutant("custom nodes: a failed import", "image/custom_nodes.sh", 'grep -qE "seconds: ', 'grep -qE "seconds.*: ', f"{CUSTOM_NODES} -k cannot_be_imported"),
    Mutant("custom nodes: a script before the start is no import", "image/custom_nodes.sh", "sed '1,/^Import times for custom nodes:/d'", "cat", f"{CUSTOM_NODES} -k before_the_start"),
    Mutant("custom nodes: a ComfyUI that does not start", "image/custom_nodes.sh", "|| failed='ComfyUI does not start'", "|| true", f"{CUSTOM_NODES} -k comfyui_that_does_not_start"),
    Mutant("custom nodes: why is shown", "image/custom_nodes.sh", '[[ -z $failed ]] || cat -- "$log" >&2', "true", f"{CUSTOM_NODES} -k cannot_be_imported"),
    Mutant("custom nodes: the check leaves the checkout alone", "image/custom_nodes.sh", "TMPDIR=$data PYTHONDONTWRITEBYTECODE=1", "TMPDIR=$data", f"{CUSTOM_NODES} -k can_be_imported_pass"),
    Mutant("custom nodes: whole commits only", "image/custom_nodes.sh", "@([0-9a-f]{40})$", "@(.+)$", f"{CUSTOM_NODES} -k whole_commit"),
    Mutant("custom nodes: one of a name", "image/custom_nodes.sh", "[[ ! -e $folder/$name ]]", "true", f"{CUSTOM_NODES} -k one_name"),
    Mutant("custom nodes: no history", "image/custom_nodes.sh", "find . -name .git -prune -exec rm -rf {} +", "rm -rf .git", f"{CUSTOM_NODES} -k history"),
    Mutant("build context: no bytecode", ".dockerignore", "**/__pycache__\n", "", "tests/unit/test_image_files.py -k lies_about"),
    Mutant("build context: only what is copied", ".dockerignore", "\n*\n", "\n", "tests/unit/test_image_files.py -k lies_about"),
]  # fmt: skip


def run_tests(tests: str, copy: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests.split()]
    return subprocess.run(command, cwd=copy, capture_output=True, text=True, timeout=300, check=False)


def is_killed(mutant: Mutant, copy: Path) -> bool:
    """Whether the tests notice. Raises ValueError where the mutant or its tests no longer fit the tree."""
    target = copy / mutant.file
    original = target.read_text()
    if original.count(mutant.old) != 1:
        raise ValueError(f"{mutant.name}: its text stands {original.count(mutant.old)} times in {mutant.file}")
    target.write_text(original.replace(mutant.old, mutant.new))
    finished = run_tests(mutant.tests, copy)
    target.write_text(original)
    if finished.returncode not in (0, TESTS_FAILED):
        raise ValueError(f"{mutant.name}: the tests did not run:\n{finished.stdout}")
    return finished.returncode == TESTS_FAILED


def survivors_of(tests: str, mutants: list[Mutant]) -> int:
    """How many of the mutants that these tests have to kill they do not. Prints a line for each."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "tree"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", ".venv", "output", "__pycache__", ".*_cache"))
        control = run_tests(tests, copy)  # else any broken test would count as a kill
        if control.returncode:
            raise ValueError(f"{tests} fails without any mutant:\n{control.stdout}")
        survivors = 0
        for mutant in mutants:
            killed = is_killed(mutant, copy)
            survivors += not killed
            print(f"{'red' if killed else 'SURVIVED':9} {mutant.name} ({mutant.file})", flush=True)
    return survivors


def main() -> int:
    wanted = sys.argv[1] if len(sys.argv) > 1 else ""
    chosen = [mutant for mutant in MUTANTS if wanted in mutant.name]
    by_tests: dict[str, list[Mutant]] = {}
    for mutant in chosen:
        by_tests.setdefault(mutant.tests, []).append(mutant)
    with ThreadPoolExecutor(AT_ONCE) as pool:
        survivors = sum(pool.map(survivors_of, by_tests.keys(), by_tests.values()))
    print(f"{len(chosen) - survivors} of {len(chosen)} mutants turned tests red")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
