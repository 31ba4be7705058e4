"""The environment, read and checked once. `start.sh` exports what it decided; the rest have the defaults below."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from worker.bucket import BucketSettings


class ConfigError(Exception):
    """A variable that cannot be used; the message names it and what it may be."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of one worker. Times in seconds, sizes in bytes."""

    ramdisk_dir: Path
    comfyui_port: int
    boot_timeout_s: float
    job_timeout_s: float
    interrupt_grace_s: float
    result_limit_bytes: int | None
    allow_url_inputs: bool
    url_input_limit_bytes: int
    url_input_timeout_s: float
    restart_comfyui_each_job: bool
    require_gpu: bool
    log_level: str
    bucket: BucketSettings | None

    @classmethod
    def from_env(cls, environ: Mapping[str, str]) -> Config:
        """Read ``environ`` (``os.environ``, or a plain dict in tests); an empty value is as good as none.

        Raises ConfigError.
        """
        limit_mb = _number(environ, "RESULT_LIMIT_MB", None, least=0.01, most=1000)
        level = (environ.get("LOG_LEVEL") or "INFO").upper()
        if level not in ("DEBUG", "INFO", "WARNING", "ERROR"):
            raise ConfigError(f"LOG_LEVEL is {level!r}; use DEBUG, INFO, WARNING or ERROR.")
        restart = _text(environ, "RESTART_COMFYUI")
        if restart not in ("", "each-job"):
            raise ConfigError(f"RESTART_COMFYUI is {restart!r}; set it to each-job, or not at all.")
        return cls(
            ramdisk_dir=Path(environ.get("RAMDISK_DIR") or "/dev/shm/comfyui"),
            comfyui_port=int(_required(environ, "COMFYUI_PORT", 8188, least=1, most=65535)),
            boot_timeout_s=_required(environ, "BOOT_TIMEOUT_S", 1800, least=1, most=86_400),
            job_timeout_s=_required(environ, "JOB_TIMEOUT_S", 3600, least=1, most=604_800),
            interrupt_grace_s=_required(environ, "INTERRUPT_GRACE_S", 10, least=0.1, most=600),
            result_limit_bytes=None if limit_mb is None else int(limit_mb * 1_000_000),
            allow_url_inputs=_flag(environ, "ALLOW_URL_INPUTS"),
            url_input_limit_bytes=int(
                _required(environ, "URL_INPUT_LIMIT_MB", 100, least=0.01, most=10_000) * 1_000_000
            ),
            url_input_timeout_s=_required(environ, "URL_INPUT_TIMEOUT_S", 60, least=0.1, most=86_400),
            restart_comfyui_each_job=restart == "each-job",
            require_gpu=_flag(environ, "REQUIRE_GPU"),  # start.sh has set it
            log_level=level,
            bucket=_bucket(environ),
        )


def _bucket(environ: Mapping[str, str]) -> BucketSettings | None:
    """All four, or none of them. Messages hold no value: a URL can hold a key."""
    four = {
        "BUCKET_ENDPOINT_URL": _text(environ, "BUCKET_ENDPOINT_URL"),
        "BUCKET_ACCESS_KEY_ID": _text(environ, "BUCKET_ACCESS_KEY_ID"),
        "BUCKET_SECRET_ACCESS_KEY": _text(environ, "BUCKET_SECRET_ACCESS_KEY"),
        "BUCKET_NAME": _text(environ, "BUCKET_NAME"),
    }
    always = _flag(environ, "BUCKET_ALWAYS")
    missing = [name for name, value in four.items() if not value]
    if len(missing) == len(four) and not always:
        return None
    if missing:
        raise ConfigError(f"A bucket needs {', '.join(four)}; set {', '.join(missing)} too, or none of them.")
    if not _is_endpoint(four["BUCKET_ENDPOINT_URL"]):
        raise ConfigError("BUCKET_ENDPOINT_URL must be of the form https://host, without a key in it.")
    return BucketSettings(
        endpoint_url=four["BUCKET_ENDPOINT_URL"],
        access_key_id=four["BUCKET_ACCESS_KEY_ID"],
        secret_access_key=four["BUCKET_SECRET_ACCESS_KEY"],
        name=four["BUCKET_NAME"],
        region=_text(environ, "BUCKET_REGION") or None,
        always=always,
    )


def _is_endpoint(text: str) -> bool:
    try:
        url = urlsplit(text)
        return url.scheme in ("http", "https") and bool(url.hostname) and url.port != 0 and url.username is None
    except ValueError:  # half an IPv6 address, or a port that is no number
        return False


def _flag(environ: Mapping[str, str], name: str) -> bool:
    value = _text(environ, name) or "0"
    if value not in ("0", "1"):
        raise ConfigError(f"{name} is {value!r}; use 0 or 1.")
    return value == "1"


def _text(environ: Mapping[str, str], name: str) -> str:
    return environ.get(name, "").strip()


def _required(environ: Mapping[str, str], name: str, default: float, *, least: float, most: float) -> float:
    value = _number(environ, name, default, least=least, most=most)
    assert value is not None  # the default is a number
    return value


def _number(environ: Mapping[str, str], name: str, default: float | None, *, least: float, most: float) -> float | None:
    text = environ.get(name, "").strip()
    if not text:
        return default
    try:
        value = float(text)
    except ValueError:
        raise ConfigError(f"{name} is {text!r}; it must be a number.") from None
    if not least <= value <= most:  # also false for NaN
        raise ConfigError(f"{name} is {text}; it must be between {least:g} and {most:g}.")
    return value
