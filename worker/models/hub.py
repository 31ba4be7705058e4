"""What is asked of the Hugging Face hub before a download, and what its refusals mean to a person.

huggingface_hub is imported in the functions, because it takes a third of a second and a worker whose models are all
in the host cache never needs it.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

from worker.models import ModelError
from worker.models.grammar import ModelEntry

if TYPE_CHECKING:
    from huggingface_hub import HfFileMetadata

RETRY_WAITS_S = (0.5, 2.0)  # between the attempts; a request ends after HF_HUB_ETAG_TIMEOUT or _DOWNLOAD_TIMEOUT (10 s)
TRANSIENT_STATUS = frozenset({408, 429, 500, 502, 503, 504})

NO_SPACE = "no space left: give the container a larger disk"

T = TypeVar("T")


def prepare_library(token: str | None) -> None:
    """What must be so before huggingface_hub is imported. Raises ModelError for a token that cannot be one."""
    if token and not re.fullmatch("[!-~]+", token):  # httpx would show the value in its error
        raise ModelError("HF_TOKEN holds characters that no token has; paste it again")
    # Else huggingface_hub 2.4.0 first asks the hub for a list of AI agents, for its user agent (_detect_agent.py).
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # many at a time; utils.py prints one line for all
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # its warnings have whole signed URLs


@contextmanager
def explained(entry: ModelEntry, token: str | None, no_space: str = NO_SPACE) -> Iterator[None]:
    """Turns the library's errors into a ModelError that names the entry and never shows the token.

    `no_space`: what to say of a full disk.
    """
    import httpx2

    try:
        yield
    # RuntimeError: from hf_xet; ValueError: from huggingface_hub, for files that it cannot fetch
    except (httpx2.HTTPError, httpx2.InvalidURL, OSError, RuntimeError, ValueError) as error:
        is_full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        sentence = no_space if is_full else explain(error, entry, token)
        raise ModelError(f"{entry.source}: {sentence.replace(token, '***') if token else sentence}") from error


def retried(ask: Callable[[], T], sleep: Callable[[float], None] = time.sleep) -> T:
    """Three attempts where the hub or the network is unwell; the last error gets through."""
    from httpx2 import TransportError
    from huggingface_hub.errors import HfHubHTTPError

    for wait_s in RETRY_WAITS_S:
        try:
            return ask()
        except TransportError:
            pass
        except HfHubHTTPError as error:
            if error.response.status_code not in TRANSIENT_STATUS:
                raise
        sleep(wait_s)
    return ask()


def metadata_of(entry: ModelEntry, token: str | None, sleep: Callable[[float], None] = time.sleep) -> HfFileMetadata:
    """Size, commit and ETag of a file, of large ones the sha256: one HEAD request. Raises ModelError.

    Asked before hf_hub_download, because that one hides what went wrong in a LocalEntryNotFoundError.
    """
    prepare_library(token)
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    with explained(entry, token):
        url = hf_hub_url(entry.repo_id, entry.filename, revision=entry.revision)
        return retried(lambda: get_hf_file_metadata(url, token=token or False), sleep)


def expand_on_hub(
    pattern: ModelEntry, token: str | None, sleep: Callable[[float], None] = time.sleep
) -> list[ModelEntry]:
    """The entries that a pattern stands for, by the hub's list of the repository. Raises ModelError."""
    prepare_library(token)
    from huggingface_hub import HfApi, constants

    api, timeout_s = HfApi(token=token or False), constants.HF_HUB_ETAG_TIMEOUT
    with explained(pattern, token):
        # Not list_repo_files, which waits without end (hf_api.py, 2.4.0).
        info = retried(lambda: api.model_info(pattern.repo_id, revision=pattern.revision, timeout=timeout_s), sleep)
    found = pattern.matching(sibling.rfilename for sibling in info.siblings or ())
    if not found:
        raise ModelError(f"{pattern.source}: no file of the repository matches: look at {page_of(pattern)}")
    return found


def page_of(entry: ModelEntry) -> str:
    """Where a person sees the repository's files."""
    from huggingface_hub import constants

    return f"{constants.ENDPOINT}/{entry.repo_id}/tree/{entry.revision or 'main'}"


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
            return f"the repository has no such file: look at {page_of(entry)}"
        case errors.DisabledRepoError():
            return f"Hugging Face has disabled the repository: see {page}"
        case errors.HfHubHTTPError():
            return _explain_status(error.response.status_code, token)
        case errors.OfflineModeIsEnabled():
            return "it has to be downloaded, but HF_HUB_OFFLINE forbids it: unset it, or put the file in place"
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
