"""The launcher as ComfyUI's Python runs it: real processes, a main.py of the test's own."""

import gc
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
WORKER = """
import sys, threading, time
def prompt_worker():
    {ends}
threading.Thread(target=prompt_worker, daemon=True).start()
time.sleep(60)
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    (tmp_path / "neighbour.py").write_text("word = 'found'\n")
    return tmp_path


def launch(checkout: Path, main: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    (checkout / "main.py").write_text(main)
    command = [sys.executable, str(ROOT / "worker/launcher.py"), "main.py", *arguments]
    return subprocess.run(command, cwd=checkout, capture_output=True, text=True, timeout=20, check=False)


def test_a_program_finds_itself_as_if_python_had_run_it(checkout: Path) -> None:
    main = (
        "import sys, neighbour\n"
        "if __name__ == '__main__':\n"
        "    print(__file__, sys.argv, sys.modules['__main__'].__file__, neighbour.word)\n"
        "    sys.exit(5)\n"
    )
    finished = launch(checkout, main, "--port", "1")
    script = str(checkout / "main.py")
    assert finished.stdout.strip() == f"{script} {[script, '--port', '1']} {script} found"
    assert finished.returncode == 5


def test_the_library_of_the_worker_is_not_in_the_way(checkout: Path) -> None:
    """ComfyUI has a `utils` package of its own; the worker's folder must not be on its path."""
    finished = launch(checkout, "import sys; print(*sys.path, sep='\\n')")
    assert not {str(ROOT), str(ROOT / "worker")} & set(finished.stdout.splitlines())
    assert finished.stdout.splitlines()[0] == str(checkout)


@pytest.mark.parametrize(
    ("ends", "said"),
    [
        ("sys.exit(3)", "died of SystemExit"),
        ("raise KeyError('prompt')", "died of KeyError"),
        ("raise KeyboardInterrupt", "died of KeyboardInterrupt"),
    ],
)
def test_the_process_ends_when_the_prompt_worker_dies(checkout: Path, ends: str, said: str) -> None:
    finished = launch(checkout, WORKER.format(ends=ends))
    assert finished.returncode == 70
    assert said in finished.stderr
    assert ("Traceback" in finished.stderr) is ("SystemExit" not in said)


def test_the_process_outlives_every_other_thread(checkout: Path) -> None:
    main = WORKER.format(ends="raise KeyError").replace("prompt_worker", "fetch_news")
    main = main.replace("time.sleep(60)", "time.sleep(0.5); sys.exit(0)")
    finished = launch(checkout, main)
    assert finished.returncode == 0
    assert "KeyError" in finished.stderr


def test_sigterm_ends_it_as_it_ends_comfyui(checkout: Path) -> None:
    (checkout / "main.py").write_text("print('up', flush=True); import time; time.sleep(60)")
    command = [sys.executable, str(ROOT / "worker/launcher.py"), "main.py"]
    with subprocess.Popen(command, cwd=checkout, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.terminate()
        assert process.wait(5) == -signal.SIGTERM


# --- the garbage collector ---

# A main.py that makes lasting objects and starts its prompt worker; then it waits until the collector is as it was.
BOOT = """
import gc, json, threading, time, weakref
{before}
kept = [[number] for number in range(500_000)]
collections = [generation["collections"] for generation in gc.get_stats()]
def prompt_worker():
    time.sleep(60)
threading.Thread(target=prompt_worker, daemon=True).start()
deadline = time.monotonic() + {wait_s}
while gc.get_freeze_count() < len(kept) and time.monotonic() < deadline:
    time.sleep(0.01)
while gc.get_threshold()[2] > 10**6 and time.monotonic() < deadline:
    time.sleep(0.01)
class Knot:
    pass
knot = Knot()
knot.itself, knot_is_there = knot, weakref.ref(knot)
del knot
gc.collect()
is_kept = gc.get_freeze_count() >= len(kept)
print(json.dumps([collections, gc.isenabled(), gc.get_threshold(), is_kept, knot_is_there() is None]))
"""


def test_only_young_garbage_is_collected_until_the_prompt_worker_is_there(checkout: Path) -> None:
    """After that the collector is as Python has it by itself, but that it leaves out what the boot has made."""
    finished = launch(checkout, BOOT.format(before="", wait_s=20))
    collections, is_enabled, threshold, is_frozen, is_collected = json.loads(finished.stdout)
    assert collections[0] > 0 and collections[1] > 0 and collections[2] == 0
    assert is_enabled and threshold == list(gc.get_threshold())
    assert is_frozen and is_collected


def test_without_the_launcher_the_same_boot_is_looked_at_as_a_whole(checkout: Path) -> None:
    """Else the test above could not fail."""
    (checkout / "main.py").write_text(BOOT.format(before="", wait_s=0))
    plain = subprocess.run([sys.executable, "main.py"], cwd=checkout, capture_output=True, timeout=20, check=True)
    collections, _, _, is_frozen, _ = json.loads(plain.stdout)
    assert collections[2] > 0 and not is_frozen


def test_what_a_custom_node_has_set_for_the_collector_stays(checkout: Path) -> None:
    finished = launch(checkout, BOOT.format(before="gc.set_threshold(5000, 20, 30)", wait_s=20))
    assert json.loads(finished.stdout)[2] == [5000, 20, 30]
