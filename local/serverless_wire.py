"""HTTP for the RunPod stand-in: bodies within limits, strict JSON, refusals, and answers that break on purpose."""

import json
import math
from typing import Any

from aiohttp import web

READ_BYTES = 64 * 1024
PAGE = "<!DOCTYPE html>\n<html><head><title>{0}</title></head><body><h1>{0}</h1></body></html>\n"


def refusal(kind: type[web.HTTPException], sentence: str) -> web.HTTPException:
    """An answer that is raised: a status code with `{"error": sentence}`."""
    return kind(text=json.dumps({"error": sentence}), content_type="application/json")


async def read_body(request: web.Request, limit_bytes: int) -> bytes:
    """Read a body of at most `limit_bytes`; a longer one is refused with 400, as RunPod does."""
    raw = bytearray()
    async for chunk in request.content.iter_chunked(READ_BYTES):
        raw += chunk
        if len(raw) > limit_bytes:
            raise refusal(web.HTTPBadRequest, f"exceeded max body size of {limit_bytes // 1_000_000}MiB")
    return bytes(raw)


def read_object(raw: bytes) -> dict[str, Any]:
    """A body as a JSON object; refused with 400 where it is none."""
    try:
        return parse_object(raw)
    except ValueError as error:
        raise refusal(web.HTTPBadRequest, f"the body cannot be read: {error}") from error


def parse_object(raw: bytes) -> dict[str, Any]:
    """Read a JSON object that can be sent on as JSON: NaN and infinite numbers are refused. Raises ValueError."""
    try:
        parsed = json.loads(raw, parse_float=_finite, parse_constant=_finite)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if not isinstance(parsed, dict):
        raise ValueError("not a JSON object")
    return parsed


def html_page(status: int, title: str) -> web.Response:
    """What a gateway puts before an API that it cannot reach."""
    return web.Response(status=status, text=PAGE.format(title), content_type="text/html")


def dropped(request: web.Request) -> web.Response:
    """Close the connection without an answer; the response returned reaches nobody."""
    assert request.transport is not None
    request.transport.close()
    return web.Response()


async def cut(request: web.Request, answer: web.Response) -> web.StreamResponse:
    """Send half of an answer, announced as whole, and close the connection."""
    assert isinstance(answer.body, bytes)
    headers = {"Content-Type": answer.content_type, "Content-Length": str(len(answer.body))}
    half = web.StreamResponse(status=answer.status, headers=headers)
    await half.prepare(request)
    await half.write(answer.body[: len(answer.body) // 2])
    assert request.transport is not None
    request.transport.close()
    return half


def _finite(number: str) -> float:
    value = float(number)
    if not math.isfinite(value):
        raise ValueError(f"{number} is no JSON number")
    return value
