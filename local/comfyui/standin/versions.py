"""In what the ComfyUI versions differ that the stand-in can be like (`--like`), as recorded from each of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Version:
    """One version; every field is a difference that a client can see.

    `features`: what GET /features says beyond preview metadata and the upload limit. `os_name`: in /system_stats.
    `names_missing_nodes`: an unknown class is `missing_node_type` with the node's title, else `invalid_prompt`.
    `touches_every_input`: what is no workflow fails as text with 500, where the others refuse it with 400 as JSON.
    `throttles_progress`: between the first and the last step only one `progress` in 100 ms, else one for each step.
    `has_jobs`: /api/jobs is there. `stamps_prompts`: a prompt's extra data gets a `create_time`;
    where not, `null` as extra data is taken, and ends the worker thread.
    `cached_needs_client`: results from the cache get into the history only of prompts with a client.
    `describes_more`: newer keys in /object_info.
    """

    name: str
    features: dict[str, Any]
    os_name: str
    names_missing_nodes: bool
    touches_every_input: bool
    throttles_progress: bool
    has_jobs: bool
    stamps_prompts: bool
    cached_needs_client: bool
    describes_more: bool


_0_18_1 = Version(
    name="0.18.1",
    features={"extension": {"manager": {"supports_v4": True}}, "node_replacements": True, "assets": False},
    os_name="linux",
    names_missing_nodes=True,
    touches_every_input=True,
    throttles_progress=True,
    has_jobs=True,
    stamps_prompts=True,
    cached_needs_client=True,
    describes_more=True,
)
_0_3_75 = Version(
    name="0.3.75",
    features={},
    os_name="posix",
    names_missing_nodes=False,
    touches_every_input=False,
    throttles_progress=False,
    has_jobs=False,
    stamps_prompts=True,
    cached_needs_client=True,
    describes_more=False,
)
_0_3_64 = Version(
    name="0.3.64",
    features={},
    os_name="posix",
    names_missing_nodes=False,
    touches_every_input=False,
    throttles_progress=False,
    has_jobs=False,
    stamps_prompts=False,
    cached_needs_client=False,
    describes_more=False,
)

VERSIONS: dict[str, Version] = {version.name: version for version in (_0_18_1, _0_3_75, _0_3_64)}
NEWEST = _0_18_1.name
