"""Inputs by URL: fetched over https, from public addresses only, straight to the RAM disk.

A name is looked up once for each request. All answers must be public, and the connection goes to one of these very
answers, under the name's certificate: nothing that a second look-up says can lead it elsewhere. A redirect is a new
request under the same rules. No proxy, cookie or password of the environment takes part.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import socket
import ssl
import threading
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass

import aiohttp
import certifi
from aiohttp.abc import AbstractResolver, ResolveResult
from yarl import URL

from worker.control import JobControl
from worker.errors import InputInvalid, InputUnreachable
from worker.https_url import is_public
from worker.input_files import UrlInput
from worker.media import check_image
from worker.ramdisk import RamDisk

PARALLEL = 4
MAX_REDIRECTS = 5
CONNECT_TIMEOUT_S = 10.0
CHUNK_BYTES = 1 << 16
POLL_S = 0.05
_REDIRECTS = (301, 302, 303, 307, 308)
_Answers = list[tuple[socket.AddressFamily, str]]


@dataclass(frozen=True)
class FetchLimits:
    """``size_bytes`` of each file, ``timeout_s`` for all files of a job together."""

    size_bytes: int
    timeout_s: float


def fetch_inputs(files: tuple[UrlInput, ...], ramdisk: RamDisk, control: JobControl, limits: FetchLimits) -> None:
    """Fetch all of ``files`` to ``input``, PARALLEL at a time, each under its name only when it is whole and checked.

    Nothing is under way any more when this returns or raises: InputInvalid for what may not be fetched,
    InputUnreachable, MediaInvalid, RamDiskFull, RamDiskError, or what ``control`` raises.
    """
    if files:
        asyncio.run(_fetch_all(files, ramdisk, control, limits))


async def _fetch_all(files: tuple[UrlInput, ...], ramdisk: RamDisk, control: JobControl, limits: FetchLimits) -> None:
    deadline = asyncio.get_running_loop().time() + limits.timeout_s
    waiting = iter(files)

    async def fetch_some() -> None:
        for file in waiting:
            await _Fetch(file, ramdisk, limits).run(deadline)

    running = {asyncio.create_task(fetch_some()) for _ in range(min(PARALLEL, len(files)))}
    try:
        pending = running
        while pending:
            control.check()
            done, pending = await asyncio.wait(pending, timeout=POLL_S, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)


class _Fetch:
    """One file: its requests, and how each failure is told. No sentence has more of a URL than its host."""

    def __init__(self, file: UrlInput, ramdisk: RamDisk, limits: FetchLimits) -> None:
        self._name = file.name
        self._is_image = file.is_image
        self._url = file.url
        self._ramdisk = ramdisk
        self._limits = limits

    async def run(self, deadline: float) -> None:
        """``deadline`` is a time of the event loop's clock."""
        try:
            async with asyncio.timeout_at(deadline):
                for _ in range(MAX_REDIRECTS + 1):
                    if await self._follow():
                        return
        except TimeoutError:
            limit = f"the limit of {self._limits.timeout_s:g} s for all URLs of a job is over (URL_INPUT_TIMEOUT_S)"
            raise self._unreachable(limit) from None
        raise self._unreachable(f"there are more than {MAX_REDIRECTS} redirects")

    async def _follow(self) -> bool:
        """One request. True when the file is there, False when there is another place to ask."""
        with self._failures_explained():
            async with self._response() as response:
                location = response.headers.get("Location")
                if response.status in _REDIRECTS and location is not None:
                    self._url = self._url.redirected(location, self._name)
                    return False
                self._check_head(response)
                await self._store(response)
        return True

    @contextlib.asynccontextmanager
    async def _response(self) -> AsyncIterator[aiohttp.ClientResponse]:
        connector = aiohttp.TCPConnector(
            resolver=_Known(await self._look_up()), use_dns_cache=False, ssl=_trusted(), force_close=True
        )
        async with (
            aiohttp.ClientSession(
                connector=connector,
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT_S),
                cookie_jar=aiohttp.DummyCookieJar(),
                auto_decompress=False,
                trust_env=False,
            ) as session,
            session.get(
                URL(str(self._url), encoded=True),  # as it was sent: a signature covers every letter of it
                headers={"Accept-Encoding": "identity", "User-Agent": "comfy-endpoint"},
                allow_redirects=False,
            ) as response,
        ):
            yield response

    async def _look_up(self) -> list[ResolveResult]:
        """The addresses of the host. Raises InputInvalid where any of them is not public."""
        answers = await _resolve(self._url.host, self._url.port)
        if not answers:
            raise self._unreachable("no such name is known")
        if not all(is_public(address) for _, address in answers):
            raise InputInvalid(
                f"{self._name!r} may not be fetched from {self._url.host}: its address is not public.",
                name=self._name,
                host=self._url.host,
            )
        return [
            ResolveResult(
                hostname=self._url.host,
                host=address,
                port=self._url.port,
                family=family,
                proto=socket.IPPROTO_TCP,
                flags=socket.AI_NUMERICHOST,
            )
            for family, address in answers
        ]

    def _check_head(self, response: aiohttp.ClientResponse) -> None:
        if response.status != 200:
            raise self._unreachable(f"it answered with status {response.status}", status=response.status)
        if response.headers.get("Content-Encoding", "identity").lower() != "identity":
            raise self._unreachable("it sends the file compressed, which it was asked not to")
        if response.content_length is None and response.headers.get("Transfer-Encoding", "").lower() != "chunked":
            raise self._unreachable("it does not tell where the file ends, so a part would pass for the whole")
        self._check_size(response.content_length or 0)

    async def _store(self, response: aiohttp.ClientResponse) -> None:
        with self._ramdisk.new_input(self._name, response.content_length) as stream:
            async for chunk in self._chunks(response):
                stream.write(chunk)
            if self._is_image:
                stream.seek(0)
                check_image(self._name, stream.read())

    async def _chunks(self, response: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
        received_bytes = 0
        # Here too: the RAM disk would take a broken connection, an OSError as well, for its own.
        with self._failures_explained():
            async for chunk in response.content.iter_chunked(CHUNK_BYTES):
                received_bytes += len(chunk)
                self._check_size(received_bytes)
                yield chunk

    def _check_size(self, size_bytes: int) -> None:
        if size_bytes > self._limits.size_bytes:
            raise InputInvalid(
                f"{self._name!r} has more than the {self._limits.size_bytes / 1e6:g} MB that this worker fetches "
                "(URL_INPUT_LIMIT_MB).",
                name=self._name,
                host=self._url.host,
                limit_bytes=self._limits.size_bytes,
            )

    @contextlib.contextmanager
    def _failures_explained(self) -> Iterator[None]:
        try:
            yield
        except (aiohttp.ClientError, OSError) as error:
            raise self._unreachable(_reason(error)) from None

    def _unreachable(self, reason: str, **details: int) -> InputUnreachable:
        sentence = f"{self._name!r} could not be fetched from {self._url.host}: {reason}."
        return InputUnreachable(sentence, name=self._name, host=self._url.host, **details)


@functools.cache  # it takes 30 ms
def _trusted() -> ssl.SSLContext:
    context = ssl.create_default_context()  # also what SSL_CERT_FILE names
    context.load_verify_locations(certifi.where())  # an image may have no certificates of its own
    return context


def _reason(error: aiohttp.ClientError | OSError) -> str:
    """Of our own words only: those of the error may hold the URL."""
    match error:
        case aiohttp.ClientConnectorCertificateError():
            return "its certificate is not valid for it"
        case aiohttp.ClientSSLError():
            return "it does not speak TLS as this worker does"
        case aiohttp.ServerTimeoutError():
            return f"no connection within {CONNECT_TIMEOUT_S:g} s"
        case aiohttp.ClientConnectorError():
            return "no connection"
        case aiohttp.ClientPayloadError() | aiohttp.ServerDisconnectedError() | OSError():
            return "the connection ended before the file did"
    return f"its answer is not HTTP as this worker knows it ({type(error).__name__})"


class _Known(AbstractResolver):
    """Says what has been looked up and checked, and asks nobody. aiohttp asks it for names only; of an address it takes
    none but the canonical form, which is its own look-up."""

    def __init__(self, answers: list[ResolveResult]) -> None:
        self._answers = answers

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        return self._answers

    async def close(self) -> None:
        pass


async def _resolve(host: str, port: int) -> _Answers:
    """The system's answers, none where it knows no such name.

    In a thread of its own that nobody waits for: nothing ends getaddrinfo, which may take minutes.
    """
    loop = asyncio.get_running_loop()
    found: asyncio.Future[_Answers] = loop.create_future()

    def tell(answers: _Answers) -> None:
        if not found.done():
            found.set_result(answers)

    def ask() -> None:
        answers: _Answers = []
        with contextlib.suppress(OSError, UnicodeError):
            answers = [
                (family, str(address[0]))
                for family, _, _, _, address in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            ]
        with contextlib.suppress(RuntimeError):  # the loop is closed: the job has gone on
            loop.call_soon_threadsafe(tell, answers)

    threading.Thread(target=ask, daemon=True).start()
    return await found
