"""The command line of ComfyUI 0.18.1 (comfy/cli_args.py): every flag is known, unknown ones are refused by argparse."""

from __future__ import annotations

import argparse
import ipaddress
import os
from pathlib import Path

from .versions import NEWEST, VERSIONS

# Flags that take no value. They are accepted because start scripts give them; none changes what the stand-in does.
_SWITCHES = (
    "auto-launch",
    "disable-auto-launch",
    "force-channels-last",
    "disable-ipex-optimize",
    "supports-fp8-compute",
    "fp16-intermediates",
    "cpu-vae",
    "disable-xformers",
    "disable-async-offload",
    "disable-dynamic-vram",
    "enable-dynamic-vram",
    "force-non-blocking",
    "disable-smart-memory",
    "deterministic",
    "mmap-torch-files",
    "disable-mmap",
    "disable-pinned-memory",
    "dont-print-server",
    "windows-standalone-build",
    "disable-api-nodes",
    "enable-manager",
    "multi-user",
    "enable-compress-response-body",
    "enable-assets",
)
# Of each group at most one may be given.
_EXCLUSIVE_SWITCHES = (
    ("cuda-malloc", "disable-cuda-malloc"),
    ("force-fp32", "force-fp16"),
    (
        "fp32-unet",
        "fp64-unet",
        "bf16-unet",
        "fp16-unet",
        "fp8_e4m3fn-unet",
        "fp8_e5m2-unet",
        "fp8_e8m0fnu-unet",
    ),
    ("fp16-vae", "fp32-vae", "bf16-vae"),
    ("fp8_e4m3fn-text-enc", "fp8_e5m2-text-enc", "fp16-text-enc", "fp32-text-enc", "bf16-text-enc"),
    (
        "use-split-cross-attention",
        "use-quad-cross-attention",
        "use-pytorch-cross-attention",
        "use-sage-attention",
        "use-flash-attention",
    ),
    ("force-upcast-attention", "dont-upcast-attention"),
    ("gpu-only", "highvram", "normalvram", "lowvram", "novram", "cpu"),
    ("disable-manager-ui", "enable-manager-legacy-ui"),
)
# Flags with one value of this type; the stand-in does not act on them.
_VALUES: dict[str, type] = {
    "tls-keyfile": str,
    "tls-certfile": str,
    "cuda-device": int,
    "default-device": int,
    "oneapi-device-selector": str,
    "preview-size": int,
    "reserve-vram": float,
    "front-end-version": str,
    "front-end-root": str,
    "comfy-api-base": str,
    "database-url": str,
}


def parse(argv: list[str], home: Path) -> argparse.Namespace:
    """The options in `argv` (without the program's name); `home` is the folder of main.py.

    The directories come back absolute. Exits with status 2, as argparse does, on a flag that ComfyUI does not know,
    and on an address that is not a loopback one: the stand-in is for one machine.
    """
    parser = argparse.ArgumentParser(description="Stand-in for ComfyUI: same flags, same protocol, no models.")
    _add_acted_on(parser)
    _add_ignored(parser)
    options = parser.parse_args(argv)
    if not _is_loopback(options.listen):
        parser.error(f"the stand-in listens on loopback addresses only, not on {options.listen}")
    if options.user_directory is not None and not Path(options.user_directory).is_dir():
        parser.error(f"argument --user-directory: the path '{options.user_directory}' is not a directory")
    if options.like not in VERSIONS:
        parser.error(f"--like (or STANDIN_LIKE) is one of {', '.join(VERSIONS)}, not {options.like}")
    base = Path(options.base_directory or home)
    options.models_directory = base / "models"
    options.custom_nodes_directory = base.absolute() / "custom_nodes"
    # main.py 0.18.1: `temp` is a folder of its own beneath --temp-directory, emptied at every start.
    for name, given in (
        ("input", options.input_directory),
        ("output", options.output_directory),
        ("temp", Path(options.temp_directory or base) / "temp"),
    ):
        setattr(options, f"{name}_directory", Path(os.path.normpath(Path.cwd() / (given or base / name))))
    return options


def _add_acted_on(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--listen", default="127.0.0.1", metavar="IP", nargs="?", const="0.0.0.0,::")
    parser.add_argument("--port", type=int, default=8188)
    parser.add_argument("--base-directory", metavar="PATH")
    parser.add_argument("--input-directory", metavar="PATH")
    parser.add_argument("--output-directory", metavar="PATH")
    parser.add_argument("--temp-directory", metavar="PATH", help="gets a folder named temp, emptied at the start")
    parser.add_argument("--user-directory", metavar="PATH", help="must exist")
    parser.add_argument("--extra-model-paths-config", nargs="+", action="append", metavar="PATH", default=[])
    parser.add_argument("--max-upload-size", type=float, default=100.0, metavar="MIB")
    parser.add_argument("--disable-metadata", action="store_true", help="no workflow in the PNG files")
    levels = ["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"]
    parser.add_argument("--verbose", default="INFO", const="DEBUG", nargs="?", choices=levels)
    like = os.environ.get("STANDIN_LIKE", NEWEST)
    parser.add_argument("--like", default=like, metavar="VERSION", help="not in ComfyUI: which version to be like")
    previews = ["none", "auto", "latent2rgb", "taesd"]
    parser.add_argument("--preview-method", choices=previews, default="none", help="none: no previews")
    parser.add_argument("--log-stdout", action="store_true", help="log to stdout; the default is stderr")
    parser.add_argument("--quick-test-for-ci", action="store_true", help="end with status 0 instead of listening")
    parser.add_argument("--disable-all-custom-nodes", action="store_true")
    parser.add_argument("--whitelist-custom-nodes", nargs="+", default=[], metavar="NAME", help="imported nevertheless")


def _add_ignored(parser: argparse.ArgumentParser) -> None:
    ignored = parser.add_argument_group("accepted, and without effect in the stand-in")
    for name in _SWITCHES:
        ignored.add_argument(f"--{name}", action="store_true")
    for names in _EXCLUSIVE_SWITCHES:
        group = parser.add_mutually_exclusive_group()
        for name in names:
            group.add_argument(f"--{name}", action="store_true")
    for name, kind in _VALUES.items():
        ignored.add_argument(f"--{name}", type=kind)
    ignored.add_argument("--enable-cors-header", nargs="?", const="*", metavar="ORIGIN")
    ignored.add_argument("--directml", type=int, nargs="?", const=-1)
    ignored.add_argument("--async-offload", type=int, nargs="?", const=2)
    ignored.add_argument("--fast", nargs="*")
    ignored.add_argument("--default-hashing-function", choices=["md5", "sha1", "sha256", "sha512"], default="sha256")
    cache = parser.add_mutually_exclusive_group()
    cache.add_argument("--cache-classic", action="store_true", help="the only cache that the stand-in has")
    cache.add_argument("--cache-lru", type=int, default=0)
    cache.add_argument("--cache-none", action="store_true")
    cache.add_argument("--cache-ram", type=float, nargs="?", const=4.0, default=0.0)


def _is_loopback(listen: str) -> bool:
    """Whether every address of a comma-separated list is a loopback address (names are not resolved)."""
    try:
        return all(ipaddress.ip_address(address).is_loopback for address in listen.split(","))
    except ValueError:
        return listen == "localhost"
