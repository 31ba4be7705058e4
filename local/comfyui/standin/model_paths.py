"""--extra-model-paths-config: more folders in which loaders look (utils/extra_config.py of ComfyUI 0.18.1)."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

_LEGACY_NAMES = {"unet": "diffusion_models", "clip": "text_encoders"}


def extra_model_folders(configs: Iterable[Path]) -> dict[str, tuple[Path, ...]]:
    """The folders that YAML files add, absolute, by the kind of their models.

    What ComfyUI trips over raises here too, as it does there: a file that is not YAML, a name that YAML does not take
    for text.
    """
    folders: dict[str, tuple[Path, ...]] = {}
    for config in configs:
        for kind, folder in _read(config):
            kind = _LEGACY_NAMES.get(kind, kind)
            folders[kind] = (*folders.get(kind, ()), folder)
    return folders


def _read(config: Path) -> Iterable[tuple[str, Path]]:
    import yaml  # type: ignore[import-untyped]  # only those who use the flag need it

    for section in yaml.safe_load(config.read_text("utf-8")).values():
        if section is None:
            continue
        base = os.path.expandvars(os.path.expanduser(section.pop("base_path", "")))  # noqa: PTH111 - a "~" of nobody stays
        section.pop("is_default", None)  # it changes the order of the folders, which nothing here depends on
        for kind, lines in section.items():
            for line in filter(None, lines.split("\n")):
                yield kind, Path(os.path.normpath(config.absolute().parent / base / line))
