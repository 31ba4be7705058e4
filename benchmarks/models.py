"""How long models take: to link, to download, to read for the first time.

    python -m benchmarks.models                      all three; 6 GB below --folder, a few minutes
    python -m benchmarks.models link read --runs 5 --json FILE
    COMFYUI_DIR=... COMFYUI_PYTHON=... python -m benchmarks.models read     beside a boot of real ComfyUI

- link: 200 models of a host cache, by `utils.py --link-only` as a process of its own, and the requests that it makes.
- download: 8 files of 200 MB from a hub on 127.0.0.1, by `utils.py` and by huggingface_hub alone, one after the other;
  once as fast as this machine can, once with 50 MB/s for each connection, as a real server limits them.
- read: a file of 3 GB, whose pages have been dropped, as the first job reads it when ComfyUI is up, with and without
  `utils.py --prefetch` beside the boot. The pages of ComfyUI and its Python are dropped as well.

Medians of runs that take turns. The files lie on a real disk, not in /tmp, which may be memory.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import hashlib
import json
import mmap
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from benchmarks.common import booting_comfyui, comfyui_dir, comfyui_python, which_comfyui, write_json
from local.__main__ import ROOT

MB, GB = 1_000_000, 1_000_000_000
LINKS = 200
FILES, FILE_BYTES = 8, 200 * MB
CONNECTION_LIMIT = 50 * MB  # bytes a second
READ_GB = 3.0
CHUNK_BYTES = 1 << 20
DEADLINE_S = 600.0
BOOT_FLAGS = ("--disable-auto-launch", "--disable-api-nodes", "--database-url", "sqlite:///:memory:")  # as start.sh's
DOWNLOAD_RATIO = 2.0  # so many times faster `utils.py` must be where each connection is limited
PLAIN_DOWNLOAD = """\
import sys
from huggingface_hub import hf_hub_download

for repo_and_file in sys.argv[2:]:
    repo_id, _, filename = repo_and_file.partition(":")
    hf_hub_download(repo_id, filename, local_dir=sys.argv[1])
"""

Figures = dict[str, float]


# --- a hub ---


class Hub:
    """FILES large files, made as they are sent, and the count of the requests."""

    def __init__(self, limit_bytes_per_s: float | None = None) -> None:
        self.limit_bytes_per_s = limit_bytes_per_s
        self.requests = 0
        self.chunk = os.urandom(CHUNK_BYTES)
        self.sha256s: list[str] = []

    def hash_files(self) -> None:
        for number in range(FILES):
            digest = hashlib.sha256()
            for piece in self.pieces(number):
                digest.update(piece)
            self.sha256s.append(digest.hexdigest())

    def pieces(self, number: int, first: int = 0) -> Iterator[memoryview]:
        """The file from byte `first` on: a safetensors header with the number in it, then one chunk over and over."""
        tensor = {"dtype": "U8", "shape": [FILE_BYTES], "data_offsets": [0, FILE_BYTES]}
        header = json.dumps({f"w{number}": tensor}).encode()
        start = len(header).to_bytes(8, "little") + header
        for piece in (start, *[self.chunk] * (FILE_BYTES // CHUNK_BYTES), self.chunk[: FILE_BYTES % CHUNK_BYTES]):
            if first < len(piece):
                yield memoryview(piece)[first:]
            first = max(0, first - len(piece))

    def size_bytes(self, number: int) -> int:
        return FILE_BYTES + len(next(self.pieces(number)))


class _HubHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def do_HEAD(self) -> None:
        self.answer(with_body=False)

    def do_GET(self) -> None:
        self.answer(with_body=True)

    def answer(self, *, with_body: bool) -> None:
        """Small and large files alike come from here: a redirect is one request more for both sides."""
        self.hub.requests += 1
        number = int(self.path.rpartition("/")[2].split(".")[0])
        first = int((self.headers["Range"] or "bytes=0-").removeprefix("bytes=").partition("-")[0])
        size = self.hub.size_bytes(number)
        self.send_response(206 if self.headers["Range"] else 200)
        self.send_header("Content-Length", str(size - first))
        self.send_header("Content-Range", f"bytes {first}-{size - 1}/{size}")
        self.send_header("X-Repo-Commit", "c" * 40)
        self.send_header("X-Linked-Size", str(size))
        self.send_header("ETag", f'"{self.hub.sha256s[number]}"')
        self.end_headers()
        if with_body:
            self.send_slowly(self.hub.pieces(number, first))

    def send_slowly(self, pieces: Iterator[memoryview]) -> None:
        started, sent = time.monotonic(), 0
        for piece in pieces:
            self.wfile.write(piece)
            sent += len(piece)
            if self.hub.limit_bytes_per_s is not None:
                time.sleep(max(0.0, started + sent / self.hub.limit_bytes_per_s - time.monotonic()))

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""


@contextlib.contextmanager
def running_hub(hub: Hub) -> Iterator[str]:
    """Yields its URL."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_HubHandler,), {"hub": hub}))
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


# --- processes ---


def environment(folder: Path, models: str, **more: str) -> dict[str, str]:
    """For utils.py and huggingface_hub, which see nothing of this machine's own caches and tokens."""
    return {
        "PATH": os.environ["PATH"],
        "HOME": str(folder),
        "COMFYUI_DIR": str(folder / "ComfyUI"),
        "HOST_CACHE_DIR": str(folder / "hub"),
        "VOLUME_DIRS": str(folder / "no-volume"),
        "RAMDISK_DIR": str(folder / "no-ramdisk"),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "MODELS": models,
        **more,
    }


def seconds_of(command: list[str], environ: Mapping[str, str]) -> float:
    """How long a process takes from its start to its end. Raises RuntimeError where it fails."""
    started = time.monotonic()
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=DEADLINE_S, check=False)
    took = time.monotonic() - started
    if done.returncode != 0:
        raise RuntimeError(f"{command[1:3]} ended with {done.returncode}: {done.stderr[-2000:]}")
    return took


def utils_command(*arguments: str) -> list[str]:
    return [sys.executable, str(ROOT / "utils.py"), *arguments]


def median_of(runs: list[Figures]) -> Figures:
    return {key: statistics.median(run[key] for run in runs) for key in runs[0]}


# --- link ---


def measure_links(folder: Path) -> Figures:
    """Once into an empty models folder, once where all links are there; and the start of Python alone."""
    fill_cache(folder / "hub")
    models = ",".join(f"bench/repo{number}:split/a.safetensors:loras:{number}.safetensors" for number in range(LINKS))
    (folder / "ComfyUI").mkdir()
    hub = Hub()
    with running_hub(hub) as url:
        environ = environment(folder, models, HF_ENDPOINT=url)
        link_s = seconds_of(utils_command("--link-only"), environ)
        again_s = seconds_of(utils_command(), environ)
    links = [path for path in (folder / "ComfyUI/models/loras").iterdir() if path.is_symlink() and path.is_file()]
    if len(links) != LINKS:
        raise RuntimeError(f"{len(links)} of {LINKS} models are linked")
    python_s = seconds_of([sys.executable, "-c", "pass"], environ)
    return {"link_s": link_s, "again_s": again_s, "python_s": python_s, "requests": hub.requests}


def fill_cache(cache: Path) -> None:
    """As huggingface_hub lays it out: a small file in each repository."""
    tensor = {"dtype": "U8", "shape": [1000], "data_offsets": [0, 1000]}
    header = json.dumps({"w": tensor}).encode()
    for number in range(LINKS):
        content = len(header).to_bytes(8, "little") + header + number.to_bytes(2, "little") * 500
        repository = cache / f"models--bench--repo{number}"
        pointer = repository / "snapshots" / ("c" * 40) / "split" / "a.safetensors"
        for place in (repository / "blobs", repository / "refs", pointer.parent):
            place.mkdir(parents=True)
        (repository / "refs" / "main").write_text("c" * 40)
        blob = repository / "blobs" / hashlib.sha256(content).hexdigest()
        blob.write_bytes(content)
        pointer.symlink_to(os.path.relpath(blob, pointer.parent))


# --- download ---


def measure_downloads(folder: Path, hub: Hub) -> Figures:
    """Both ways, each into an empty folder that is removed afterwards."""
    figures = {}
    names = [f"bench/model:{number}.safetensors" for number in range(FILES)]
    plain = [sys.executable, "-c", PLAIN_DOWNLOAD, str(folder / "plain"), *names]
    with running_hub(hub) as url:
        environ = environment(folder, ",".join(f"{name}:loras" for name in names), HF_ENDPOINT=url)
        for way, command, target in (
            ("plain", plain, folder / "plain"),
            ("utils", utils_command(), folder / "ComfyUI"),
        ):
            target.mkdir()
            figures[f"{way}_s"] = seconds_of(command, environ)
            came = sum(path.stat().st_size for path in target.rglob("*.safetensors"))
            if came != sum(map(hub.size_bytes, range(FILES))):
                raise RuntimeError(f"{way}: {came} bytes came")
            shutil.rmtree(target)
            os.sync()  # the next one does not write this one's pages
    return figures | {"ratio": figures["plain_s"] / figures["utils_s"]}


# --- read ---


def make_large_file(path: Path, size_bytes: int) -> None:
    path.parent.mkdir(parents=True)
    chunk = os.urandom(8 << 20)
    with path.open("wb") as file:
        for number in range(-(-size_bytes // len(chunk))):
            file.write(number.to_bytes(8, "little") + chunk[8:])
        file.truncate(size_bytes)
        os.fsync(file.fileno())


def drop_pages(path: Path) -> None:
    """Of a file, or of all files below a folder."""
    for file in [path] if path.is_file() else path.rglob("*"):
        with contextlib.suppress(OSError):
            descriptor = os.open(file, os.O_RDONLY)
            try:
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(descriptor)


def resident_share(path: Path) -> float:
    """How much of a file is in the page cache, 0 to 1 (mincore(2))."""
    libc = ctypes.CDLL(None, use_errno=True)
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as view:
        pages = (ctypes.c_ubyte * -(-len(view) // mmap.PAGESIZE))()
        start = ctypes.c_char.from_buffer(view)
        failed = libc.mincore(ctypes.c_void_p(ctypes.addressof(start)), ctypes.c_size_t(len(view)), pages)
        del start  # else the view cannot be closed
        if failed:
            raise OSError(ctypes.get_errno(), "mincore")
    return sum(page & 1 for page in pages) / len(pages)


def read_seconds(path: Path) -> float:
    buffer = memoryview(bytearray(8 << 20))
    started = time.monotonic()
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass
    return time.monotonic() - started


def measure_read(folder: Path, file: Path, *, prefetch: bool) -> Figures:
    """The boot, then the first read of the model; both from a cold page cache."""
    prefix = subprocess.run(
        [comfyui_python(), "-c", "import sys; print(sys.prefix)"], capture_output=True, text=True, check=True
    )
    for path in (file, comfyui_dir(), Path(prefix.stdout.strip())):
        drop_pages(path)
    if (share := resident_share(file)) > 0.01:
        raise RuntimeError(f"{share:.0%} of {file} are still in memory: something has it open")
    reader = None
    with booting_comfyui(folder, *BOOT_FLAGS) as comfyui:
        if prefetch:
            environ = environment(folder, f"bench/large:{file.name}:checkpoints")
            reader = subprocess.Popen(utils_command("--prefetch"), env=environ, stderr=subprocess.DEVNULL)
        while not comfyui.answers():
            if time.monotonic() - comfyui.started > DEADLINE_S:
                raise RuntimeError("ComfyUI does not answer")
            time.sleep(0.05)
        boot_s = time.monotonic() - comfyui.started
        ahead = resident_share(file)
        read_s = read_seconds(file)
        if reader is not None and reader.wait(DEADLINE_S) != 0:
            raise RuntimeError("--prefetch failed")
    return {"boot_s": boot_s, "read_s": read_s, "both_s": boot_s + read_s, "ahead": ahead}


# --- the tables ---


def links_table(folder: Path, options: argparse.Namespace) -> tuple[list[Figures], bool]:
    measured = []
    for number in range(options.runs):
        measured.append(measure_links(new_folder(folder, f"link{number}")))
    median = median_of(measured)
    print(f"{LINKS} models of a host cache | s   | requests")
    print(f"utils.py --link-only          | {median['link_s']:.2f} | {median['requests']:.0f}")
    print(f"utils.py when all are linked  | {median['again_s']:.2f} |")
    print(f"Python alone                  | {median['python_s']:.2f} |\n", flush=True)
    return measured, median["requests"] == 0


def downloads_table(folder: Path, options: argparse.Namespace) -> tuple[list[Figures], bool]:
    hub, measured, ratio = Hub(), [], 0.0
    hub.hash_files()
    files = f"{FILES} x {FILE_BYTES / MB:.0f} MB"
    print(f"{files:15} | huggingface_hub in sequence, s | utils.py, s | ratio (lowest, highest)")
    for limit in (None, CONNECTION_LIMIT):
        hub.limit_bytes_per_s = limit
        of_limit = []
        for number in range(options.runs):
            of_limit.append(measure_downloads(new_folder(folder, f"download{number}"), hub))
        measured += [{**run, "limit_mb_per_s": (limit or 0) / MB} for run in of_limit]
        median = median_of(of_limit)
        ratio, ratios = median["ratio"], [run["ratio"] for run in of_limit]
        label = "no limit" if limit is None else f"{limit / MB:.0f} MB/s each"
        print(
            f"{label:15} | {median['plain_s']:30.1f} | {median['utils_s']:11.1f} | "
            f"{ratio:.2f} ({min(ratios):.2f}, {max(ratios):.2f})",
            flush=True,
        )
    print()
    return measured, ratio >= DOWNLOAD_RATIO


def read_table(folder: Path, options: argparse.Namespace) -> tuple[list[Figures], bool]:
    here = new_folder(folder, "read")
    file = here / "ComfyUI" / "models" / "checkpoints" / "large.safetensors"
    make_large_file(file, int(options.read_gb * GB))
    measured: dict[bool, list[Figures]] = {False: [], True: []}
    for number in range(options.runs):
        for prefetch in (False, True) if number % 2 == 0 else (True, False):
            measured[prefetch].append(measure_read(here, file, prefetch=prefetch))
    print(f"{options.read_gb:g} GB beside a boot of {which_comfyui()} | boot, s | then read, s | both, s | read ahead")
    for prefetch, runs_so in measured.items():
        median = median_of(runs_so)
        print(
            f"{'with' if prefetch else 'without':7} --prefetch | {median['boot_s']:.1f} | {median['read_s']:.2f} | "
            f"{median['both_s']:.1f} | {median['ahead']:.0%}"
        )
    pairs = list(zip(measured[False], measured[True], strict=True))
    later = statistics.median(with_it["boot_s"] - without["boot_s"] for without, with_it in pairs)
    sooner = statistics.median(without["both_s"] - with_it["both_s"] for without, with_it in pairs)
    print(f"median of the pairs: the boot {later:+.1f} s, boot and read together {-sooner:+.1f} s\n", flush=True)
    return [{**run, "prefetch": float(way)} for way, runs_so in measured.items() for run in runs_so], True


def new_folder(parent: Path, name: str) -> Path:
    folder = parent / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return folder


TABLES = {"link": links_table, "download": downloads_table, "read": read_table}


def main() -> int:
    """Returns 1 where linking makes a request, or downloads are not DOWNLOAD_RATIO times as fast as in sequence."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.models", description="How long models take.")
    parser.add_argument("what", nargs="*", help=f"of {', '.join(TABLES)}; default: all")
    parser.add_argument("--runs", type=int, default=3, help="runs of each (default: 3); the tables have medians")
    parser.add_argument("--read-gb", type=float, default=READ_GB, help="size of the file that is read (default: 3)")
    parser.add_argument("--folder", type=Path, default=Path("/var/tmp"), help="on a real disk (default: /var/tmp)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="every run goes there")
    options = parser.parse_args()
    if unknown := set(options.what) - TABLES.keys():
        parser.error(f"there is no {', '.join(sorted(unknown))}; there are {', '.join(TABLES)}")
    runs, all_good = {}, True
    for name in options.what or TABLES:
        with tempfile.TemporaryDirectory(prefix="comfy-endpoint-bench-", dir=options.folder) as folder:
            runs[name], is_good = TABLES[name](Path(folder), options)
        all_good = all_good and is_good
    write_json(options.json, runs)
    return 0 if all_good else 1


if __name__ == "__main__":
    sys.exit(main())
