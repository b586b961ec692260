"""What goes between a folder and the Hugging Face Hub: a repository's list of files, bytes of files, and errors.

By huggingface_hub's requests, errors and settings. Each error becomes a sentence that says what to do. Nothing here
imports torch.
"""

import errno
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO
from urllib.parse import quote, urlsplit

from huggingface_hub import constants, get_token, hf_hub_url
from huggingface_hub.errors import (
    DisabledRepoError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import http_get
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_backoff

from pairtune.errors import UserError

WAITS = (1, 2, 4, 8)  # seconds before each further attempt, where an answer does not say how many
BUSY = (500, 502, 503, 504)  # answers that are worth another attempt; http_get sees to 429 itself
# The client's HTTP library was requests, then httpx, then httpx2; its errors are what HfHubHTTPError derives from.
UNREACHABLE = (OSError, *HfHubHTTPError.__bases__)


class Unreachable(UserError):
    """The Hub cannot be asked: what depends on its answer is not known, what follows from names and rules is."""


@dataclass(frozen=True)
class Source:
    """A repository and where to ask for it; `endpoint` is None for HF_ENDPOINT or else huggingface.co."""

    repo_id: str
    repo_type: str = "model"  # or "dataset"
    revision: str | None = None
    endpoint: str | None = None
    token: str | None = field(default=None, repr=False)

    @property
    def host(self) -> str:
        """The endpoint's address."""
        return (self.endpoint or constants.ENDPOINT).rstrip("/")

    @property
    def page(self) -> str:
        """The repository's page, for people."""
        return f"{self.host}/{'datasets/' if self.repo_type == 'dataset' else ''}{self.repo_id}"

    def sent_token(self) -> str | bool:
        """Returns the token to send: `token`, else HF_TOKEN's, else what `hf auth login` stored; False for none.

        Asked for anew before each request: the client renews stored tokens that expire.

        Raises:
            UserError: There is one that cannot be sent. The message does not show it.
        """
        where, found = "--hf-token", self.token
        if found is None:
            where = "HF_TOKEN or what `hf auth login` stored"
            try:
                found = None if constants.HF_HUB_DISABLE_IMPLICIT_TOKEN else get_token()
            except (OSError, ValueError) as error:
                raise UserError(
                    f"{where}: cannot be read ({type(error).__name__}); give another token: --hf-token TOKEN"
                ) from None
            if found is None:
                return False
        token = found.strip()
        if not token:
            raise UserError(f"{where}: is empty; give a token, or leave the option out")
        if not (token.isascii() and token.isprintable()) or " " in token:
            raise UserError(
                f"{where}: holds a space, a line break or another character that no token has; copy the token again"
            )
        return token

    def __str__(self) -> str:
        return f"{self.kind} {self.repo_id} ({self.revision or 'main'}) from {self.host}"

    @property
    def kind(self) -> str:
        """What it is, in words."""
        return "data set" if self.repo_type == "dataset" else "model"


@dataclass(frozen=True)
class File:
    """A file as the repository states it; the checksum is LFS's SHA-256 or git's SHA-1, "" where none is stated."""

    name: str
    size: int  # bytes
    checksum: str


# Requests


def list_files(source: Source) -> Iterator[File]:
    """Yields the files of a repository at a commit. A list of many comes in pages, each of which names the next."""
    url = f"{source.host}/api/{source.repo_type}s/{source.repo_id}/tree/{quote(source.revision or 'main', safe='')}"
    url += "?recursive=true"
    while url:
        # As a mirror may send on to the Hub's own pages: the token goes to the endpoint alone.
        token = source.sent_token() if _origin(url) == _origin(source.host) else False
        answer = http_backoff("GET", url, headers=build_hf_headers(token=token), timeout=30)
        hf_raise_for_status(answer)
        for row in answer.json():
            if row["type"] == "file":
                stated = row.get("lfs") or row
                is_checksum = re.fullmatch("[0-9a-f]{64}" if row.get("lfs") else "[0-9a-f]{40}", stated["oid"] or "")
                yield File(row["path"], int(stated["size"]), stated["oid"] if is_checksum else "")
        url = answer.links.get("next", {}).get("url")


def _origin(url: str) -> tuple[str, str]:
    return urlsplit(url).scheme, urlsplit(url).netloc.lower()


def get(source: Source, file: File, content: BinaryIO, update: Callable[[int], None]) -> None:
    """Appends to `content` what it lacks of a file; asks for nothing where nothing is missing.

    The token goes to the endpoint alone: where it leads elsewhere, as to the Hub's file store, the client drops it.
    """
    url = hf_hub_url(
        source.repo_id, file.name, repo_type=source.repo_type, revision=source.revision, endpoint=source.endpoint
    )
    # Not compressed: what arrived is counted in the file's own bytes.
    headers = build_hf_headers(token=source.sent_token()) | {"Accept-Encoding": "identity"}
    to = {"headers": headers, "expected_size": file.size, "tqdm_class": _relay(update)}
    patiently(lambda: http_get(url, content, resume_size=content.tell(), **to), BUSY)


def patiently(ask: Callable, busy: tuple[int, ...]):
    """Returns what `ask` returns; asks again a few times, waiting ever longer, while a status of `busy` answers."""
    for wait in WAITS:
        try:
            return ask()
        except HfHubHTTPError as error:
            status, said = error.response.status_code, error.response.headers.get("Retry-After", "")
            if status not in busy:
                raise
            seconds = int(said) if said.isdecimal() else wait
            print(f"{error.response.url.host} answers {status}; asking again in {seconds} s")
            time.sleep(seconds)
    return ask()


def _relay(update: Callable[[int], None]) -> type:
    """Returns what `http_get` takes for a progress bar, where one bar counts all files."""

    class Relay:
        def __init__(self, **kwargs):
            self.update = update

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

    return Relay


# What went wrong


def explained(error: Exception, source: Source, folder: Path | None = None) -> UserError:
    """Returns what went wrong and the way out, in one sentence or two. `folder` is None while the Hub is asked."""
    repo, host, said = source.repo_id, source.host, first_line(error, source)
    login = "--hf-token TOKEN, or HF_TOKEN, or `hf auth login`"
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    if isinstance(error, HFValidationError):
        return UserError(f"{repo}: a {source.kind} is named owner/name, as on {host}")
    elsewhere = urlsplit(str(error.response.url)).netloc if status else None
    if elsewhere not in (None, urlsplit(host).netloc.lower()):
        return UserError(
            f"{repo}: {elsewhere}, to which {host} leads, answers {status}: the address may have expired, or a proxy "
            f"may forbid it; the same command again asks for a new one (a token goes to {host} only)"
        )
    if isinstance(error, GatedRepoError) and status == 403:
        return UserError(
            f"{repo} is gated, and your token has no access to it: accept its licence at {source.page}, wait where its "
            f"owners grant access by hand, or give another token: {login}"
        )
    if isinstance(error, GatedRepoError):
        return UserError(f"{repo} is gated: accept its licence at {source.page}, then give your token: {login}")
    if isinstance(error, RevisionNotFoundError):
        return UserError(
            f"{repo} has no revision {source.revision}; its branches and tags are at {source.page}/tree/main"
        )
    if isinstance(error, RepositoryNotFoundError):
        other = "; a data set: --repo-type dataset" if source.repo_type == "model" else "; a model: without --repo-type"
        return UserError(f"{repo}: no such {source.kind} at {host}, or a private one; if it is yours: {login}{other}")
    if isinstance(error, DisabledRepoError):
        return UserError(f"{repo}: is disabled, by its owners or the Hub ({source.page}); no token helps, take another")
    if status in (401, 403) and not source.sent_token():
        return UserError(
            f"{repo}: {host} answers {status} without a token ({said}); a proxy may forbid it, or "
            f"it needs your token: {login}"
        )
    if status == 401:
        return UserError(
            f"{repo}: {host} does not know your token ({said}), which may be mistyped, expired or "
            f"revoked; another one: {login}"
        )
    if status == 403:
        return UserError(
            f"{repo}: {host} forbids it to your token ({said}); allow it to read this repository at "
            f"{host}/settings/tokens, or give another one: {login}"
        )
    if status is not None:
        return UserError(f"{repo}: {host} answers with an error, try later: {said}")
    if isinstance(error, OfflineModeIsEnabled):
        return Unreachable(f"{repo}: HF_HUB_OFFLINE is set, so {host} is not asked; unset it to download")
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return UserError(no_space(folder, "the disk is full"))
    if isinstance(error, OSError) and error.filename is not None:  # of a file, not of a connection
        return UserError(f"{folder}: cannot be written ({error}); another folder: --output-dir DIR")
    why = f"({type(error).__name__}: {said})"
    if folder is None:
        return Unreachable(
            f"{repo}: {host} cannot be reached {why}; check the network, or another host: --endpoint URL"
        )
    return UserError(
        f"{repo}: the connection to {host} broke off {why}; the same command again goes on where it stopped"
    )


def no_space(folder: Path, why: str) -> str:
    """Returns that a folder's disk is full, and the way out."""
    return f"{folder}: {why}; another disk: --output-dir DIR"


def first_line(error: Exception, source: Source) -> str:
    """Returns what an error says, without the token: a server may send back what it was sent."""
    line, token = str(error).strip().partition("\n")[0], source.sent_token()
    return line.replace(token, "***") if token else line
