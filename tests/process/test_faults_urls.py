"""Inputs by URL: rows U of FAULTS.md. The servers are real ones on loopback, the names are those of public_names/."""

import contextlib
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from tests.process.fault_rows import Row
from tests.process.picture_server import PictureServer, make_certificate, picture_server
from tests.process.stack import Driver, base64_of, boot, invert_workflow, picture_bytes, wait_until

RESOLVER = Path(__file__).with_name("public_names")
SECRET = "c0ffee5ecret"  # in every URL here, and in nothing that anybody is told
PUBLIC = "93.184.215.14"
PRIVATE = {  # tests/unit/test_https_url.py has all kinds of addresses
    "loopback.example": ["127.0.0.1"],
    "metadata.example": ["169.254.169.254"],
    "mapped.example": ["::ffff:127.0.0.1"],
    "mixed.example": [PUBLIC, "127.0.0.1"],
}
NAMES = {
    "pictures.example": [[PUBLIC]],
    "other.example": [["1.2.3.4"]],
    "rebinding.example": [[PUBLIC], ["127.0.0.1"]],
    "silent.example": [[]],
    "untrusted.example": [[PUBLIC]],
    "misnamed.example": [[PUBLIC]],  # in no certificate
    **{name: [answers] for name, answers in PRIVATE.items()},
}
LIMIT_MB = 6
RAMDISK_MB = 12


class Internet:
    """A worker that takes URLs, and the servers that it may ask."""

    def __init__(self, worker: Driver, server: PictureServer, untrusted: PictureServer, log_path: Path) -> None:
        self.worker = worker
        self.server = server
        self.untrusted = untrusted
        self._log_path = log_path
        self._seen = 0

    def url(self, path: str, host: str = "pictures.example", query: str = "") -> str:
        port = self.untrusted.port if host == "untrusted.example" else self.server.port
        return f"https://{host}:{port}/{path}?sig={SECRET}&{query}"

    def redirect(self, target: str) -> str:
        return self.url("redirect", query=f"to={quote(target, safe='')}")

    def run(self, url: str, **more: Any) -> dict[str, Any]:
        """The answer to a job whose picture is at ``url``."""
        return self.told(self.worker.run(by_url(url, **more)))

    def told(self, answer: dict[str, Any]) -> dict[str, Any]:
        assert SECRET not in json.dumps(answer)
        return answer

    @property
    def has_small_ramdisk(self) -> bool:
        return shutil.disk_usage(self.worker.ramdisk).total <= RAMDISK_MB << 20

    def network(self) -> list[str]:
        """What has been looked up and connected to since the last call."""
        text = self._log_path.read_text()
        new, self._seen = text[self._seen :], len(text)
        return new.splitlines()


def by_url(url: str, **more: Any) -> dict[str, Any]:
    return {"workflow": invert_workflow(), "images": {"a.png": url}, **more}


@contextlib.contextmanager
def small_ramdisk(folder: Path) -> Iterator[Path | None]:
    """A RAM disk of RAMDISK_MB in ``folder``; none where it cannot be mounted."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={RAMDISK_MB}m", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(mount, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        mounted = False
    try:
        yield folder / "comfyui" if mounted else None
    finally:
        if mounted:
            subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture(scope="session")
def url_stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Internet]:
    folder = tmp_path_factory.mktemp("urls")
    make_certificate(
        folder / "trusted.pem", [name for name in NAMES if name not in ("untrusted.example", "misnamed.example")]
    )
    make_certificate(folder / "other.pem", ["untrusted.example"])
    (folder / "network").touch()
    settings = {
        "ALLOW_URL_INPUTS": "1",
        "URL_INPUT_LIMIT_MB": str(LIMIT_MB),
        "URL_INPUT_TIMEOUT_S": "3",
        "LOG_LEVEL": "DEBUG",
        "SSL_CERT_FILE": str(folder / "trusted.pem"),
        "HTTPS_PROXY": "http://127.0.0.1:9",  # nothing listens there
        "PYTHONPATH": str(RESOLVER),
        "PUBLIC_NAMES": json.dumps(NAMES),
        "PUBLIC_NAMES_LOG": str(folder / "network"),
        "RAMDISK_MIN_MB": "1",
    }
    with contextlib.ExitStack() as stack:
        if ramdisk := stack.enter_context(small_ramdisk(folder / "ramdisk")):
            settings["RAMDISK_DIR"] = str(ramdisk)
        server = stack.enter_context(picture_server(folder / "trusted.pem"))
        untrusted = stack.enter_context(picture_server(folder / "other.pem"))
        worker = stack.enter_context(boot(folder / "log", **settings))
        yield Internet(worker, server, untrusted, folder / "network")


@pytest.fixture
def internet(url_stack: Internet) -> Iterator[Internet]:
    url_stack.server.asked.clear()
    url_stack.network()
    yield url_stack
    assert SECRET not in url_stack.worker.log()


# --- what may be fetched ---


@pytest.mark.fault("U1")
def test_a_url_is_refused_unless_the_worker_is_set_to_take_it(row: Row, worker: Driver) -> None:
    row.fails(worker.run(by_url("https://127.0.0.1/a.png")), "INPUT_INVALID", "'a.png' is a URL", "ALLOW_URL_INPUTS=1")
    row.next_job_runs(worker)


@pytest.mark.fault("U2")
def test_pictures_and_files_are_fetched_and_nothing_else_is_told(row: Row, internet: Internet) -> None:
    signed = internet.url("picture.png", query="X-Amz-Credential=a%2Fb%7E&plus=%2B+~")
    elsewhere = internet.redirect(internet.url("chunked-picture.png", "other.example"))
    row.succeeds(internet.run(signed, files={"folder/b.png": elsewhere}))
    network = internet.network()
    for name, address, requests in (("pictures.example", PUBLIC, 2), ("other.example", "1.2.3.4", 1)):
        assert network.count(f"asked {name}") == network.count(f"connected {address}") == requests
    asked = dict(internet.server.asked)
    assert asked.keys() == {address.partition(str(internet.server.port))[2] for address in (signed, elsewhere)} | {
        f"/chunked-picture.png?sig={SECRET}&"
    }
    sent = {name for headers in asked.values() for name in headers}
    assert sent == {"Host", "Accept", "Accept-Encoding", "User-Agent", "Connection"}
    row.next_job_runs(internet.worker)


@pytest.mark.fault("U3")
def test_what_is_not_plain_https_is_refused_before_anything_is_asked(row: Row, internet: Internet) -> None:
    for url, words in {
        f"http://pictures.example/a.png?{SECRET}": "only https",
        f"https://user:{SECRET}@pictures.example/a.png": "a password",
        f"https://2130706433/a.png?{SECRET}": "not of the form",
        f"https://pictures.example\\@127.0.0.1/{SECRET}": "not of the form",
    }.items():
        row.fails(internet.run(url), "INPUT_INVALID", "'a.png'", words)
    assert internet.network() == []
    row.next_job_runs(internet.worker)


@pytest.mark.fault("U4")
def test_an_address_that_is_not_public_is_not_connected_to(row: Row, internet: Internet) -> None:
    for host in (*PRIVATE, "127.0.0.1", "[fd00:ec2::254]"):
        answer = internet.run(internet.url("picture.png", host))
        row.fails(answer, "INPUT_INVALID", "'a.png'", host.strip("[]"), "not public")
    assert internet.network() == [f"asked {name}" for name in PRIVATE]
    assert internet.server.asked == []
    row.next_job_runs(internet.worker)


@pytest.mark.fault("U5")
def test_a_redirect_is_held_to_the_same_rules(row: Row, internet: Internet) -> None:
    for target, words in {
        internet.url("picture.png", "metadata.example"): "not public",
        f"//[::ffff:127.0.0.1]:{internet.server.port}/picture.png?{SECRET}": "not public",
        f"http://pictures.example/a.png?{SECRET}": "only https",
        f"file:///etc/passwd?{SECRET}": "not of the form",
    }.items():
        row.fails(internet.run(internet.redirect(internet.redirect(target))), "INPUT_INVALID", "'a.png'", words)
    assert [path for path, _ in internet.server.asked if not path.startswith("/redirect")] == []
    row.next_job_runs(internet.worker)


@pytest.mark.fault("U6")
def test_redirects_without_end_are_given_up(row: Row, internet: Internet) -> None:
    row.fails(internet.run(internet.url("again")), "INPUT_UNREACHABLE", "pictures.example", "more than 5 redirects")
    assert len(internet.server.asked) == 6
    row.next_job_runs(internet.worker)


@pytest.mark.fault("U7")
def test_the_address_that_was_checked_is_the_one_that_is_connected_to(row: Row, internet: Internet) -> None:
    row.succeeds(internet.run(internet.url("picture.png", "rebinding.example")))
    assert internet.network() == ["asked rebinding.example", f"connected {PUBLIC}"]
    answer = internet.run(internet.url("picture.png", "rebinding.example"))
    row.fails(answer, "INPUT_INVALID", "not public")
    assert internet.network() == ["asked rebinding.example"]
    row.next_job_runs(internet.worker)


# --- what does not come as it should ---


@pytest.mark.fault("U8")
def test_a_file_above_the_limit_is_refused(row: Row, internet: Internet) -> None:
    for path in ("megabytes.png", "unannounced.png"):
        details = row.fails(
            internet.run(internet.url(path, query=f"of={LIMIT_MB + 1}")), "INPUT_INVALID", "'a.png'", f"{LIMIT_MB} MB"
        )
        assert details["limit_bytes"] == LIMIT_MB * 1_000_000
    row.next_job_runs(internet.worker)


@pytest.mark.fault("U9")
def test_a_server_that_keeps_one_waiting_is_left(row: Row, internet: Internet) -> None:
    for url in (internet.url("drip-head.png"), internet.url("picture.png", "silent.example")):
        row.fails(internet.run(url), "INPUT_UNREACHABLE", "'a.png'", ".example", "URL_INPUT_TIMEOUT_S")
    row.next_job_runs(internet.worker)


@pytest.mark.fault("U10")
def test_what_cannot_be_fetched_is_told_with_file_and_host(row: Row, internet: Internet) -> None:
    for url, words in {
        internet.url("missing.png"): "status 404",
        internet.url("error.png"): "status 500",
        internet.url("lost.png"): "ended before the file did",
        internet.url("endless.png"): "does not tell where the file ends",
        internet.url("gzip.png"): "compressed",
        internet.url("garbage.png"): "not HTTP",
        internet.url("picture.png", "no-such-name.invalid"): "no such name",
        f"https://pictures.example:1/a.png?{SECRET}": "no connection",
    }.items():
        row.fails(internet.run(url), "INPUT_UNREACHABLE", "'a.png'", ".", words)
    row.next_job_runs(internet.worker)


@pytest.mark.fault("U11")
def test_a_server_without_a_valid_certificate_is_not_listened_to(row: Row, internet: Internet) -> None:
    for host in ("untrusted.example", "misnamed.example"):
        row.fails(internet.run(internet.url("picture.png", host)), "INPUT_UNREACHABLE", host, "certificate")
    assert internet.server.asked == internet.untrusted.asked == []
    row.next_job_runs(internet.worker)


@pytest.mark.fault("U12")
def test_what_is_no_whole_picture_is_refused(row: Row, internet: Internet) -> None:
    row.fails(internet.run(internet.url("text.png")), "MEDIA_INVALID", "'a.png' is not an image")
    row.fails(internet.run(internet.url("half.png")), "MEDIA_INVALID", "'a.png' is damaged or cut short")
    row.next_job_runs(internet.worker)


# --- the job and the worker ---


@pytest.mark.fault("U13")
def test_a_job_cancelled_while_it_downloads_is_left_at_once(row: Row, internet: Internet) -> None:
    job_id = internet.worker.start_job(by_url(internet.url("drip.png")))
    wait_until(lambda: internet.server.asked, "the download has begun")
    internet.worker.cancel(job_id)
    row.ends(internet.told(internet.worker.finish(job_id)), "CANCELLED")
    row.next_job_runs(internet.worker)
    ends = [line for line in internet.worker.log().splitlines() if f"[{job_id}]" in line and "WARNING" in line]
    assert len(ends) == 1
    assert "JOB_CANCELLED" in ends[0]


@pytest.mark.fault("U14")
def test_a_job_past_its_deadline_while_it_downloads_is_stopped(row: Row, internet: Internet) -> None:
    job_id = internet.worker.start_job(by_url(internet.url("drip.png"), timeout_s=1))
    (partial,) = wait_until(internet.worker.job_files, "the download is on the RAM disk")
    assert re.fullmatch(r"\.[0-9a-f]{16}\.part", partial.name)  # ComfyUI never sees a part of a file under its name
    row.fails(internet.told(internet.worker.finish(job_id)), "JOB_TIMEOUT", "within 1 s")
    row.next_job_runs(internet.worker)


@pytest.mark.fault("U15")
def test_four_are_fetched_at_a_time(row: Row, internet: Internet) -> None:
    files = {f"{number}.png": internet.url(f"meet.{number}.png") for number in range(7)}
    row.succeeds(internet.run(internet.url("meet.png"), files=files))
    assert len(internet.server.asked) == 8
    row.next_job_runs(internet.worker)


@pytest.mark.fault("U16")
def test_a_ram_disk_that_fills_up_while_it_is_written_is_told(row: Row, internet: Internet) -> None:
    if not internet.has_small_ramdisk:
        pytest.skip("a small RAM disk can be mounted by root only")
    files = {f"{number}.bin": internet.url(f"megabytes.{number}", query=f"of={LIMIT_MB - 1}") for number in range(3)}
    details = row.fails(internet.run(internet.url("picture.png"), files=files), "RAM_DISK_FULL", "--shm-size")
    assert details["needed_bytes"] == (LIMIT_MB - 1) * 1_000_000
    row.next_job_runs(internet.worker)


@pytest.mark.fault("U17")
def test_names_are_held_to_the_rules_of_other_inputs(row: Row, internet: Internet) -> None:
    url = internet.url("picture.png")
    coded = base64_of(picture_bytes())
    for files, words in (
        ({"../b.png": url}, "stay inside"),
        ({"a.png": coded}, "Two files are named"),
        ({"a.png/b.png": coded}, "as the folder of"),
    ):
        row.fails(internet.run(url, files=files), "INPUT_INVALID", words)
    assert internet.server.asked == []
    row.next_job_runs(internet.worker)
