"""Servers of pictures on loopback that speak https, and all that can go wrong with one."""

import contextlib
import datetime
import ssl
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from tests.process.stack import picture_bytes

MEGABYTE = bytes(1_000_000)
DRIP_S = 0.05
MAX_DRIPS = 400
MEETING_S = 10.0


def make_certificate(path: Path, names: list[str]) -> None:
    """A key and a certificate that signs itself, in one PEM file."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, names[0])])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder(subject, subject, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name) for name in names]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    form, no_password = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    path.write_bytes(key.private_bytes(pem, form, no_password) + certificate.public_bytes(pem))


class PictureServer(ThreadingHTTPServer):
    """``asked`` has every request: its path with the query, and its headers."""

    daemon_threads = True

    def __init__(self, certificate: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.asked: list[tuple[str, dict[str, str]]] = []
        self.meeting = threading.Barrier(4)
        self._tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._tls.load_cert_chain(certificate)

    @property
    def port(self) -> int:
        return int(self.server_address[1])

    def finish_request(self, request: Any, client_address: Any) -> None:
        with contextlib.suppress(OSError), self._tls.wrap_socket(request, server_side=True) as secure:
            super().finish_request(secure, client_address)


class _Handler(BaseHTTPRequestHandler):
    server: PictureServer
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.close_connection = True
        self.server.asked.append((self.path, dict(self.headers.items())))
        kind = urlsplit(self.path).path.strip("/").replace("-", "_").partition(".")[0]
        getattr(self, f"_{kind}")()

    def _send(self, body: bytes, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content_Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def _chunks(self, parts: Iterator[bytes]) -> None:
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for part in parts:
            self.wfile.write(b"%x\r\n%s\r\n" % (len(part), part))
        self.wfile.write(b"0\r\n\r\n")

    def _picture(self) -> None:
        self._send(picture_bytes(), Set_Cookie="cookie=1")

    def _chunked_picture(self) -> None:
        self._chunks(iter([picture_bytes()[:100], picture_bytes()[100:]]))

    def _meet(self) -> None:
        """Answers when four requests are there at a time."""
        self.server.meeting.wait(MEETING_S)
        self._picture()

    def _redirect(self) -> None:
        self._send(b"", 302, Location=parse_qs(urlsplit(self.path).query)["to"][0])

    def _again(self) -> None:
        self._send(b"", 307, Location="/again")

    def _missing(self) -> None:
        self._send(b"no such picture", 404)

    def _error(self) -> None:
        self._send(b"no server", 500)

    def _text(self) -> None:
        self._send(b"<html>sign in first</html>")

    def _half(self) -> None:
        """Half a picture that claims to be all."""
        self._send(picture_bytes()[:-100])

    def _lost(self) -> None:
        """The connection ends in the middle of a picture."""
        self._send(picture_bytes()[:-100], Content_Length=str(len(picture_bytes())))

    def _garbage(self) -> None:
        self.wfile.write(b"\0\xff\r\n" * 100)

    def _endless(self) -> None:
        """A picture of which only the end of the connection says where it ends."""
        self.send_response(200)
        self.end_headers()
        self.wfile.write(picture_bytes())

    def _gzip(self) -> None:
        self._send(picture_bytes(), Content_Encoding="gzip")

    def _megabytes(self) -> None:
        """``of=N`` of them, announced."""
        self._send(MEGABYTE * int(parse_qs(urlsplit(self.path).query)["of"][0]))

    def _unannounced(self) -> None:
        """``of=N`` megabytes, in chunks."""
        count = int(parse_qs(urlsplit(self.path).query)["of"][0])
        self._chunks(MEGABYTE for _ in range(count))

    def _drip(self) -> None:
        """Never silent, and never done."""
        self._chunks(self._drops())

    def _drip_head(self) -> None:
        self.send_response(200)
        for _ in self._drops():
            self.send_header("X-Drop", "1")
            self.flush_headers()

    def _drops(self) -> Iterator[bytes]:
        for _ in range(MAX_DRIPS):
            time.sleep(DRIP_S)
            yield b"0"

    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextlib.contextmanager
def picture_server(certificate: Path) -> Iterator[PictureServer]:
    server = PictureServer(certificate)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
