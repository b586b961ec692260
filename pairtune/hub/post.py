"""One request to an endpoint, and what came of it. The key goes to the address that was given, and into no message."""

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from http.client import HTTPException, HTTPResponse
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

from pairtune.errors import UserError

BUSY = (408, 409, 425, 429)  # and whatever is 500 or above: worth another try
LARGEST = 4 << 20  # bytes of a reply
LONGEST = 600.0  # seconds that are waited, however long a service wants


@dataclass(frozen=True)
class Answer:
    """What came of a request.

    Attributes:
        status: HTTP's; 0: none came, or not all of what it stands before.
        content: Of a 200.
        told: What is wrong, in a few words; without the key.
        retry_after: Seconds that the service wants to be left alone, if it says so.
        unsent: The request did not arrive, so that nobody is paid for it.
    """

    status: int
    content: bytes = b""
    told: str = ""
    retry_after: float | None = None
    unsent: bool = False

    @property
    def busy(self) -> bool:
        """Whether another try may help."""
        return not self.status or self.status in BUSY or self.status >= 500

    @property
    def refused(self) -> bool:
        """Whether no other try will help."""
        return self.status != 200 and not self.busy


class _StaysHere(HTTPRedirectHandler):
    """Follows no address that a server names: the key is for the one that was given."""

    def redirect_request(self, *args, **kwargs):
        return None


_OPENER = build_opener(_StaysHere)


def check_address(address: str, option: str, keys: Sequence[str]) -> str:
    """Returns an endpoint's address without a slash at its end.

    Args:
        option: What it was given by, for messages.
        keys: As for `key_of_environment`.

    Raises:
        UserError: It is no http address, or holds a secret.
    """
    parts = urlsplit(address)
    if parts.username or parts.password or parts.query or parts.fragment:
        raise UserError(
            f"{option}{parts.scheme}://{parts.hostname}...: an address holds no name, password or ?key=...; a key is "
            f"read from {keys[0]} in the environment"
        )
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UserError(f"{option}{address}: is no address: http://HOST:PORT/v1, or https://HOST/v1")
    return address.rstrip("/").removesuffix("/chat/completions")


def key_of_environment(keys: Sequence[str]) -> str | None:
    """Returns the key to send, from the first of these variables that holds one; None for none.

    Raises:
        UserError: There is one that cannot be sent. The message does not show it.
    """
    name = next((name for name in keys if os.environ.get(name, "").strip()), None)
    if name is None:
        return None
    key = os.environ[name].strip()
    if not (key.isascii() and key.isprintable()) or " " in key:
        raise UserError(f"{name}: holds a space, a line break or another character that no key has; copy it again")
    return key


def post(url: str, body: bytes, key: str | None, timeout_s: float) -> Answer:
    """Sends one request.

    Args:
        body: JSON.
        timeout_s: Seconds for all of the reply.
    """
    request = Request(url, body, {"Content-Type": "application/json", "User-Agent": "pairtune"}, method="POST")
    if key:
        request.add_unredirected_header("Authorization", f"Bearer {key}")
    until = time.monotonic() + timeout_s
    try:
        with _OPENER.open(request, timeout=timeout_s) as response:
            return Answer(200, _read(response, until))
    except HTTPError as error:
        return Answer(error.code, told=_said(error, key), retry_after=_retry_after(error))
    except URLError as error:  # while connecting or sending
        may_be_sent = isinstance(error.reason, (TimeoutError, ConnectionResetError, BrokenPipeError))
        return Answer(0, told=_masked(str(error.reason), key), unsent=not may_be_sent)
    except (OSError, HTTPException) as error:
        told = "no reply in time" if isinstance(error, TimeoutError) else f"the line is cut ({type(error).__name__})"
        return Answer(0, told=told)


def _read(response: HTTPResponse, until: float) -> bytes:
    """Returns all of a reply, or raises OSError: none may be endless, or so slow that it never ends."""
    found, total = b"", response.length  # bytes, where the server says how many
    while total is None or len(found) < total:
        part = response.read1(1 << 16)
        if not part and total is not None:
            raise ConnectionResetError
        if not part:
            break
        found += part
        if len(found) > LARGEST:
            raise OSError("too long")
        if time.monotonic() > until:
            raise TimeoutError
    return found


def _said(error: HTTPError, key: str | None) -> str:
    try:
        text = error.read(2000).decode("utf-8", "replace")
    except (OSError, HTTPException):
        text = ""
    return _masked(" ".join(text.split())[:300] or str(error.reason), key)


def _masked(text: str, key: str | None) -> str:
    return text.replace(key, "***") if key else text


def _retry_after(error: HTTPError) -> float | None:
    said = error.headers.get("Retry-After", "")
    return min(LONGEST, float(said)) if said.replace(".", "", 1).isdecimal() else None
