"""Take out one safeguard at a time, in a copy of the tree: a test must turn red each time.

    make mutants                 all of them
    python -m tests.mutants wipe those whose name contains "wipe"

A mutant that survives means that the tests would not notice if somebody removed that safeguard. Exit code 1 then.
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
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
RESULTS = "tests/process/test_faults_results.py"

MUTANTS = [
    Mutant("nonce", "worker/run.py", ", NONCE_INPUT: nonce}", "}", f"{MAIN} -k word_for_word"),
    Mutant("nonce: a node that refuses it", "worker/run.py", "if kind == \"TypeError\" and NONCE_INPUT in message", "if False and NONCE_INPUT in message", f"{COMFYUI} -k extra_input"),
    Mutant("nonce: files of an earlier job", "worker/run.py", "if stale and self._stale_left:", "if False:", f"{COMFYUI} -k link_from"),
    Mutant("fsync", "worker/ramdisk.py", "os.fsync(stream.fileno())", "pass", "tests/process/test_write_order.py tests/unit/test_ramdisk.py"),
    Mutant("rename", "worker/ramdisk.py", 'f".{secrets.token_hex(8)}.part"', "leaf", "tests/process/test_write_order.py tests/unit/test_ramdisk.py"),
    Mutant("wipe: zeros", "worker/ramdisk.py", "overwrite_with_zeros(entry.name, directory_fd)", "pass", f"{MAIN} -k debug_keeps"),
    Mutant("wipe: after the job", "rp_handler.py", 'with steps("wipe"):\n                    self._wipe()', "pass", f"{MAIN} -k three_jobs"),
    Mutant("wipe: before the job", "rp_handler.py", "self.ramdisk.wipe()\n        return state", "return state", f"{MAIN} -k debug_keeps"),
    Mutant("wipe: the log", "worker/process.py", "os.truncate(self._log_path, 0)", "pass", f"{MAIN} -k three_jobs"),
    Mutant("wiped at the start", "start.sh", "        wipe_ramdisk || die", "        true || die", f"{STOPPING} -k killed_worker"),
    Mutant("status is read", "worker/follow.py", "if failure is not None:", "if False:", f"{MAIN} -k cannot_run"),
    Mutant("history is deleted", "rp_handler.py", "self.process.scrub_log, self.comfyui.clear_history)", "self.process.scrub_log)", f"{MAIN} -k three_jobs"),
    Mutant("history retries", "worker/follow.py", "HISTORY_WAITS_S = (0.010, 0.050, 0.250, 1.250, 6.250)", "HISTORY_WAITS_S = ()", "tests/unit/test_follow.py"),
    Mutant("websocket: the end without it", "worker/follow.py", "if not feed.is_open or ended_unheard or now - quiet_since >= QUIET_S:", "if False:", f"{WEBSOCKET} -k refused"),
    Mutant("websocket: reopened", "worker/follow.py", "feed.reopen_if_due()", "pass", f"{WEBSOCKET} -k refused"),
    Mutant("websocket: pictures sent again", "worker/follow.py", "if feed.was_down:", "if False:", f"{WEBSOCKET} -k only_the_websocket"),
    Mutant("websocket: deep garbage", "worker/feed.py", "except (ValueError, RecursionError):", "except ValueError:", f"{WEBSOCKET} -k garbage"),
    Mutant("deadline and cancellation", "worker/follow.py", "self._control.check()\n            message", "message", f"{PLATFORM} -k own_deadline"),
    Mutant("deadline on a clock of its own", "worker/control.py", "clock: Callable[[], float] = time.monotonic", "clock: Callable[[], float] = time.time", f"{PLATFORM} -k wall_clock"),
    Mutant("deadline while the POST is not answered", "worker/comfyui_server.py", "                self._check()\n            except (JobTimeout", "                pass\n            except (JobTimeout", f"{COMFYUI} -k post_that"),
    Mutant("interrupt", "worker/follow.py", "self._stop()\n            raise", "raise", f"{PLATFORM} -k own_deadline"),
    Mutant("killed after the grace", "worker/follow.py", "                self._server.end()", "                pass", f"{COMFYUI} -k let_go"),
    Mutant("shielded thread", "rp_handler.py", "control.cancel()", "pass", f"{PLATFORM} -k makes_way"),
    Mutant("crash is seen", "worker/follow.py", "self._server.raise_if_dead()  #", "pass  #", "tests/unit/test_follow.py -k restart"),
    Mutant("hung is told from slow", "worker/comfyui_server.py", "if used_s - self._cpu_s > IDLE_CPU_S:", "if False:", "tests/unit/test_comfyui_answers.py -k only_slow"),
    Mutant("a dead prompt worker ends ComfyUI", "worker/launcher.py", "os._exit(EXIT_CODE)", "pass", f"{COMFYUI} -k prompt_worker_died"),
    Mutant("out of memory is told from killed", "worker/process.py", "out_of_memory = _oom_kills(counter) > before", "pass", "tests/unit/test_process.py -k count_of_kills"),
    Mutant("memory is freed after a run that had too little", "worker/run.py", "comfyui.free_memory()  # for the next job", "pass", f"{COMFYUI} -k too_little"),
    Mutant("queue is cleared", "rp_handler.py", "not self.comfyui.clear_queue(self.config.interrupt_grace_s)", "False", f"{COMFYUI} -k leftover"),
    Mutant("secrets are masked", "worker/comfyui_errors.py", 'text = text.replace(word, "***")', "pass", f"{COMFYUI} -k no_secret"),
    Mutant("output: cut short", "worker/outputs.py", "and is_cut_short(data):", "and False:", f"{COMFYUI} -k not_whole"),
    Mutant("SIGTERM while idle", "rp_handler.py", "number, self.leave)", "number, lambda: None)", f"{PLATFORM} -k idle_worker"),
    Mutant("SIGTERM: ComfyUI is supervised on", "start.sh", 'elif has_ended "$comfyui_pid"; then', 'elif ((!stopping)) && has_ended "$comfyui_pid"; then', f"{PLATFORM} -k after_sigterm"),
    Mutant("a dead sshd is a warning", "start.sh", "sshd_pid=''\n            log WARNING", "die 1", f"{PLATFORM} -k sshd"),
    Mutant("progress", "rp_handler.py", "self._newest = progress", "pass", f"{MAIN} -k progress"),
    Mutant("progress: not too often", "rp_handler.py", "PROGRESS_INTERVAL_S = 1.0", "PROGRESS_INTERVAL_S = 0.05", f"{PLATFORM} -k burst"),
    Mutant("size limit", "worker/delivery.py", "elif body_bytes > self.limit_bytes:", "elif False:", "tests/unit/test_delivery.py"),
    Mutant("size limit: all that is posted", "rp_handler.py", '"timings_ms": WIDEST_TIMINGS_MS,', "", f"{RESULTS} -k just_under"),
    Mutant("size limit: texts beside links", "worker/delivery.py", "self._check_without_files(result)  # before", "pass  # before", f"{RESULTS} -k texts_too"),
    Mutant("memory: inputs are let go of", "rp_handler.py", "job_input.clear()", "pass", "tests/process/test_memory.py"),
    Mutant("memory: what is freed goes back", "start.sh", "MALLOC_MMAP_THRESHOLD_=1048576 exec", "exec", "tests/process/test_memory.py"),
    Mutant("bucket: several at a time", "worker/bucket.py", "PARALLEL_UPLOADS = 4", "PARALLEL_UPLOADS = 1", f"{RESULTS} -k several_files"),
    Mutant("bucket: sent again", "worker/bucket.py", 'if wait_s is None or not failure.details["retried"]:', "if True:", f"{RESULTS} -k fails_twice"),
    Mutant("bucket: refusals are final", "worker/bucket.py", 'not failure.details["retried"]:', "False:", f"{RESULTS} -k does_not_exist"),
    Mutant("bucket: deadline and cancellation", "worker/bucket.py", "                control.check()\n", "", f"{RESULTS} -k up_the_deadline"),
    Mutant("bucket: keys stay out of the log", "rp_handler.py", '("urllib3", "botocore", "boto3")', '("urllib3",)', f"{RESULTS} -k several_files"),
    Mutant("input check", "worker/payload.py", "check_image(image.name, image.data)", "pass", f"{MAIN} -k cannot_run"),
    Mutant("secrets stay out of ComfyUI", "start.sh", '        unset "${!RUNPOD_@}"', '        : "${!RUNPOD_@}"', "tests/process/test_start_sh.py -k secret"),
    Mutant("checkout unchanged", "start.sh", "PYTHONDONTWRITEBYTECODE=1", "NOTHING=1", "tests/process/test_start_sh.py -k byte_identical"),
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


def main() -> int:
    wanted = sys.argv[1] if len(sys.argv) > 1 else ""
    chosen = [mutant for mutant in MUTANTS if wanted in mutant.name]
    survivors = 0
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "tree"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", ".venv", "output", "__pycache__", ".*_cache"))
        for tests in sorted({mutant.tests for mutant in chosen}):  # else any broken test would count as a kill
            control = run_tests(tests, copy)
            if control.returncode:
                raise ValueError(f"{tests} fails without any mutant:\n{control.stdout}")
        for mutant in chosen:
            killed = is_killed(mutant, copy)
            survivors += not killed
            print(f"{'red' if killed else 'SURVIVED':9} {mutant.name} ({mutant.file})", flush=True)
    print(f"{len(chosen) - survivors} of {len(chosen)} mutants turned tests red")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
