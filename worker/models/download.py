"""Downloads, several at a time: each file whole under its final name, or not there at all.

A file comes into a staging folder beside its destination, and nowhere else: models/ and its folders may be mounts of
their own, and os.replace does not cross them. ComfyUI does not list what lies there: its name ends in .incomplete.
"""

from __future__ import annotations

import contextlib
import hashlib
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from worker.models import ModelError
from worker.models.grammar import ModelEntry
from worker.models.hub import explained, metadata_of, retried
from worker.models.lease import CLOCK_PREFIX, GRAVE_PREFIX, STALE_S, age_s, every, heartbeat, lease
from worker.models.sources import find_flaw, link

if TYPE_CHECKING:
    from huggingface_hub import HfFileMetadata

PARALLEL = 4
PROGRESS_EVERY_S = 5.0
HASH_CHUNK_BYTES = 8 << 20
STAGING_PREFIX = ".download-"
ALIVE = "alive"  # the file in a staging folder that its owner touches


@dataclass
class Download:
    """One file to fetch. `place`: where it is stored, which is `entry.path`, or on a network volume."""

    entry: ModelEntry
    place: Path
    is_shared: bool
    """whether other hosts see the place"""
    metadata: HfFileMetadata | None = None
    sha256: str | None = None
    seconds: float = 0.0
    error: ModelError | None = None
    staging: Path | None = field(default=None, repr=False)
    lease: Path | None = field(default=None, repr=False)
    stop: threading.Event = field(default_factory=threading.Event, repr=False)

    @property
    def lease_path(self) -> Path:
        """Whose holder downloads it, on a volume that several workers see."""
        name = hashlib.sha256(self.place.name.encode(errors="replace")).hexdigest()[:32]  # its own may be too long
        return self.place.with_name(f".{name}.lease")

    @property
    def advice(self) -> str:
        """What helps where there is no space."""
        return "enlarge the network volume" if self.is_shared else "give the container a larger disk"

    @property
    def size_bytes(self) -> int:
        return (self.metadata.size if self.metadata else None) or 0

    @property
    def expected_sha256(self) -> str | None:
        """The hub's ETag of a large file; huggingface_hub 2.4.0 does not hold the file against it."""
        etag = (self.metadata.etag if self.metadata else None) or ""
        return etag if len(etag) == 64 else None

    def go_on(self) -> None:
        """Raises ModelError where the run is being stopped."""
        if self.stop.is_set():
            raise ModelError(f"{self.entry.source}: stopped")

    def abandon(self) -> None:
        """Take away what lies on the disk before it is done; a thread may still be writing there."""
        for _ in range(20):
            if not self.staging or not self.staging.exists():
                break
            shutil.rmtree(self.staging, ignore_errors=True)
            time.sleep(0.01)
        if self.lease:
            self.lease.unlink(missing_ok=True)

    def fetched_bytes(self) -> int:
        """What has come so far."""
        total = 0
        with contextlib.suppress(OSError):
            for path in self.staging.rglob("*") if self.staging else ():
                total += path.stat().st_size if path.is_file() else 0
        return total


def run_downloads(
    downloads: Sequence[Download],
    *,
    token: str | None,
    say: Callable[[str], None],
    parallel: int = PARALLEL,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Fetch all of them, biggest first; each has its `error` or its place afterwards. Raises nothing for one alone.

    Space is reckoned in the order given, before the first byte.
    """
    ask_all(downloads, token, sleep)
    _reserve_space(downloads)
    waiting = sorted((one for one in downloads if one.error is None), key=lambda one: -one.size_bytes)
    if not waiting:
        return
    try:
        with _progress(waiting, say):
            _for_all(waiting, parallel, lambda download: _fetch(download, token, sleep))
    except BaseException:  # SIGTERM: nothing may stay behind
        for download in waiting:
            download.abandon()
        raise


def _for_all(downloads: Sequence[Download], parallel: int, work: Callable[[Download], None]) -> None:
    """In threads. SIGTERM waits a second for them and no longer: they may wait for the network."""
    stop = threading.Event()
    for download in downloads:
        download.stop = stop
    pool = ThreadPoolExecutor(parallel)
    futures: list[Future[None]] = []
    try:
        for download in downloads:
            futures.append(pool.submit(work, download))
        # In slices: a signal that comes just before a wait without end is not heard until that ends.
        while wait(futures, timeout=1.0).not_done:
            pass
        for future in futures:
            future.result()
    except BaseException:
        stop.set()
        pool.shutdown(wait=False, cancel_futures=True)
        wait(futures, timeout=1.0)
        raise
    pool.shutdown()


def ask_all(downloads: Sequence[Download], token: str | None, sleep: Callable[[float], None] = time.sleep) -> None:
    """Size and sha256 of each, or its `error`."""
    _for_all(downloads, 2 * PARALLEL, lambda download: _ask(download, token, sleep))


def _ask(download: Download, token: str | None, sleep: Callable[[float], None]) -> None:
    try:
        download.metadata = metadata_of(download.entry, token, sleep)
    except ModelError as error:
        download.error = error


def _reserve_space(downloads: Sequence[Download]) -> None:
    """Refuse what does not fit, also beside the ones before it. Orphans of killed runs are removed first."""
    free_bytes: dict[int, int] = {}
    for download in downloads:
        if download.error is not None:
            continue
        folder = download.place.parent
        try:
            folder.mkdir(parents=True, exist_ok=True)
            remove_orphans(folder, is_shared=download.is_shared)
            if download.is_shared and download.lease_path.exists() and age_s(download.lease_path) <= STALE_S:
                continue  # another is downloading it: that takes the space, and we wait
            device = folder.stat().st_dev
            free = free_bytes.setdefault(device, shutil.disk_usage(folder).free)
        except OSError as error:
            download.error = ModelError(f"{download.entry.source}: {error.filename or folder}: {error.strerror}")
            continue
        if download.size_bytes > free:
            download.error = ModelError(
                f"{download.entry.source}: no space: it has {download.size_bytes / 1e6:,.1f} MB, and {folder} has"
                f" {free / 1e6:,.1f} MB free; {download.advice}"
            )
        else:
            free_bytes[device] = free - download.size_bytes


def remove_orphans(folder: Path, *, is_shared: bool) -> None:
    """Take away what killed runs have left in a folder. Raises OSError.

    On a disk of our own that is every staging folder whose lock is free: the kernel releases a dead process's lock.
    On a volume that other hosts see, a lock says nothing; there the age of the heartbeat decides.
    """
    for small in (*folder.glob(f"{CLOCK_PREFIX}*"), *folder.glob(f"{GRAVE_PREFIX}*")):
        with contextlib.suppress(FileNotFoundError):
            if age_s(small) > STALE_S:
                small.unlink()
    for staging in folder.glob(f"{STAGING_PREFIX}*"):
        alive = staging / ALIVE
        with contextlib.suppress(FileNotFoundError):  # its owner has just ended
            if not alive.exists():  # it was killed before it had made it, or in the middle of taking all away
                is_orphan = age_s(staging) > STALE_S
            else:
                is_orphan = age_s(alive) > STALE_S if is_shared else not _is_locked(alive)
            if is_orphan:
                shutil.rmtree(staging)


def _is_locked(path: Path) -> bool:
    import fcntl

    with path.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


@contextlib.contextmanager
def _staging(folder: Path) -> Iterator[Path]:
    """A folder for one download, which others know to be alive for as long as the block runs."""
    import fcntl

    with tempfile.TemporaryDirectory(prefix=STAGING_PREFIX, dir=folder) as name:
        alive = Path(name, ALIVE)
        with alive.open("w") as file, heartbeat(alive):
            with contextlib.suppress(OSError):  # a volume without locks
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield Path(name)


def _fetch(download: Download, token: str | None, sleep: Callable[[float], None]) -> None:
    started_s = time.monotonic()
    try:
        download.go_on()
        with explained(download.entry, token, f"no space left at {download.place.parent}: {download.advice}"):
            if download.is_shared:
                lock = download.lease_path

                def pause(seconds: float) -> None:
                    (download.stop.wait if sleep is time.sleep else sleep)(seconds)
                    download.go_on()

                with lease(lock, is_done=lambda: _is_there(download), sleep=pause) as is_ours:
                    if is_ours:
                        download.lease = lock
                        download.go_on()
                        remove_orphans(download.place.parent, is_shared=True)  # of the one that held it before
                        _fetch_here(download, token, sleep)
                        download.lease = None
                link(download.place, download.entry.path)
            else:
                _fetch_here(download, token, sleep)
    except ModelError as error:
        download.error = error
    download.seconds = time.monotonic() - started_s


def _is_there(download: Download) -> bool:
    path = download.place
    size_bytes = download.size_bytes or None
    return path.is_file() and size_bytes in (None, path.stat().st_size) and find_flaw(path) is None


def _fetch_here(download: Download, token: str | None, sleep: Callable[[float], None]) -> None:
    """Two attempts: a body that came wrong may come right, and huggingface_hub itself resumes a broken connection."""
    for is_last in (False, True):
        download.go_on()
        with _staging(download.place.parent) as staging:
            download.staging = staging
            # Renamed, because ComfyUI lists the models in every folder, hidden ones too.
            file = _body(download, staging, token, sleep).rename(staging / "body.incomplete")
            flaw = _flaw_of(download, file)
            if flaw is None:
                file.replace(download.place)
                return
        if is_last:
            raise ModelError(
                f"{download.entry.source}: the file that came {flaw}; run again, or ask the owner of the repository"
            )


def _body(download: Download, staging: Path, token: str | None, sleep: Callable[[float], None]) -> Path:
    from huggingface_hub import hf_hub_download

    entry, metadata = download.entry, download.metadata
    return Path(
        retried(
            lambda: hf_hub_download(
                entry.repo_id,
                entry.filename,
                revision=(metadata.commit_hash if metadata else None) or entry.revision,
                local_dir=staging,
                token=token or False,
                force_download=True,  # else it takes what the local cache has, broken or not
            ),
            sleep,
        )
    )


def _flaw_of(download: Download, file: Path) -> str | None:
    """Why the file is not what the hub has; notes its sha256."""
    if download.expected_sha256 is not None:
        download.sha256 = sha256_of(file)
        if download.sha256 != download.expected_sha256:
            return "has not the content that the hub promises (sha256)"
    return find_flaw(file, download.place.suffix)


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        buffer = memoryview(bytearray(HASH_CHUNK_BYTES))
        while got := file.readinto(buffer):
            digest.update(buffer[:got])
    return digest.hexdigest()


@contextlib.contextmanager
def _progress(downloads: Sequence[Download], say: Callable[[str], None]) -> Iterator[None]:
    """A line every few seconds: how many, how much, how fast, how long still."""
    total_bytes = sum(download.size_bytes for download in downloads)
    say(f"downloading {len(downloads)} model{'s' * (len(downloads) > 1)}, {total_bytes / 1e9:.2f} GB")
    started_s = time.monotonic()

    def report() -> None:
        done = [one for one in downloads if one.seconds]
        came_bytes = sum(one.size_bytes if one.seconds else one.fetched_bytes() for one in downloads)
        rate = came_bytes / (time.monotonic() - started_s)
        left = f", {(total_bytes - came_bytes) / rate:.0f} s left" if rate and came_bytes <= total_bytes else ""
        say(
            f"{len(done)} of {len(downloads)} models, {came_bytes / 1e9:.2f} of {total_bytes / 1e9:.2f} GB,"
            f" {rate / 1e6:.0f} MB/s{left}"
        )

    with every(PROGRESS_EVERY_S, report):
        yield
