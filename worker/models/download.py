"""Download one model with huggingface_hub: whole under its final name, or not there at all.

huggingface_hub is imported in the functions, because it takes a third of a second and a worker whose models are all
in the host cache never needs it.
"""

import errno
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from worker.models import ModelError
from worker.models.grammar import ModelEntry
from worker.models.sources import find_flaw

if TYPE_CHECKING:
    from huggingface_hub import HfFileMetadata

METADATA_WAITS_S = (0.5, 2.0)  # between the attempts; each of them ends after HF_HUB_ETAG_TIMEOUT (10 s)
TRANSIENT_STATUS = frozenset({408, 429, 500, 502, 503, 504})


def download(entry: ModelEntry, *, token: str | None, sleep: Callable[[float], None] = time.sleep) -> None:
    """Fetch a model to `entry.path`, over whatever is there. `token`: a Hugging Face token, or None.

    The metadata is asked for three times at most (33 s), a broken connection resumed by huggingface_hub (5 times
    without progress; file_download.py, http_get, 2.4.0). Raises ModelError.
    """
    if token and not re.fullmatch("[!-~]+", token):  # httpx would show the value in its error
        raise ModelError(f"{entry.source}: HF_TOKEN holds characters that no token has; paste it again")
    # Else huggingface_hub 2.4.0 first asks the hub for a list of AI agents, for its user agent (_detect_agent.py).
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    import httpx2

    try:
        _download(entry, token, sleep)
    # RuntimeError: from hf_xet; ValueError: from huggingface_hub, for files that it cannot fetch
    except (httpx2.HTTPError, httpx2.InvalidURL, OSError, RuntimeError, ValueError) as error:
        sentence = explain(error, entry, token)
        raise ModelError(f"{entry.source}: {sentence.replace(token, '***') if token else sentence}") from error


def _download(entry: ModelEntry, token: str | None, sleep: Callable[[float], None]) -> None:
    from huggingface_hub import hf_hub_download

    metadata = _metadata(entry, token, sleep)
    folder = entry.path.parent
    folder.mkdir(parents=True, exist_ok=True)
    free_bytes = shutil.disk_usage(folder).free
    if metadata.size is not None and metadata.size > free_bytes:
        raise ModelError(
            f"{entry.source}: no space: it has {metadata.size / 1e6:,.1f} MB, and {folder} has"
            f" {free_bytes / 1e6:,.1f} MB free; give the container a larger disk"
        )
    # Beside the destination and nowhere else: models/ and its folders may be mounts of their own, and os.replace
    # does not cross them. ComfyUI does not list the partial file: its name ends in .incomplete.
    with tempfile.TemporaryDirectory(prefix=".download-", dir=folder) as staging:
        file = Path(
            hf_hub_download(
                entry.repo_id,
                entry.filename,
                revision=metadata.commit_hash or entry.revision,
                local_dir=staging,
                token=token,
            )
        )
        flaw = find_flaw(file)
        if flaw:
            raise ModelError(
                f"{entry.source}: the file that came {flaw}; run again, or ask the owner of the repository"
            )
        file.replace(entry.path)


def _metadata(entry: ModelEntry, token: str | None, sleep: Callable[[float], None]) -> "HfFileMetadata":
    """Size and commit of the file: one HEAD request, up to three times where the hub or the network is unwell.

    Asked before hf_hub_download, because that one hides what went wrong in a LocalEntryNotFoundError.
    """
    from httpx2 import TransportError
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import HfHubHTTPError

    url = hf_hub_url(entry.repo_id, entry.filename, revision=entry.revision)
    for wait_s in METADATA_WAITS_S:
        try:
            return get_hf_file_metadata(url, token=token)
        except TransportError:
            pass
        except HfHubHTTPError as error:
            if error.response.status_code not in TRANSIENT_STATUS:
                raise
        sleep(wait_s)
    return get_hf_file_metadata(url, token=token)


def explain(error: Exception, entry: ModelEntry, token: str | None) -> str:
    """What a person can do about an error of huggingface_hub 2.4.0 (errors.py); it may hold the token."""
    from huggingface_hub import constants, errors

    page = f"{constants.ENDPOINT}/{entry.repo_id}"
    match error:
        case errors.LocalEntryNotFoundError(__cause__=Exception() as cause):
            return explain(cause, entry, token)
        case errors.GatedRepoError():
            then = "with the account of HF_TOKEN" if token else "and set HF_TOKEN"
            return f"the repository is gated: accept its terms at {page} {then}"
        case errors.RepositoryNotFoundError():
            then = "let HF_TOKEN's account read it" if token else "set HF_TOKEN"
            return f"there is no repository at {page}, or it is private: check the RepoID, or {then}"
        case errors.RevisionNotFoundError():
            return f"the repository has no revision {entry.revision or 'main'}: look at {page}/tree/main"
        case errors.RemoteEntryNotFoundError():
            return f"the repository has no such file: look at {page}/tree/{entry.revision or 'main'}"
        case errors.DisabledRepoError():
            return f"Hugging Face has disabled the repository: see {page}"
        case errors.HfHubHTTPError():
            return _explain_status(error.response.status_code, token)
        case errors.OfflineModeIsEnabled():
            return "it has to be downloaded, but HF_HUB_OFFLINE forbids it: unset it, or put the file in place"
        case OSError(errno=errno.ENOSPC):
            return f"no space left at {entry.path.parent}: give the container a larger disk"
        case OSError(strerror=str(reason)) if error.filename:
            return f"{error.filename}: {reason}"
        case OSError() | RuntimeError() | ValueError():
            return f"the download failed: {_first_line(error)}"
    return f"no connection to {constants.ENDPOINT} ({type(error).__name__}: {_first_line(error)}): check the network"


def _explain_status(status: int, token: str | None) -> str:
    if status == 401 and token:
        return "Hugging Face does not accept HF_TOKEN (401): make a new one in your account's settings"
    if status in (401, 403):
        return f"access is refused ({status}): HF_TOKEN needs the right to read this repository"
    if status == 429:
        return "Hugging Face limits the rate of requests (429): wait some minutes, or set HF_TOKEN"
    return f"Hugging Face answered with {status}: try again later"


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
