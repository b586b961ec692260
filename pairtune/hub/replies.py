"""What an endpoint has said, a line each, on the disk as it comes: nothing that was said is asked for again."""

import fcntl
import json
import os
import threading
from collections import Counter
from pathlib import Path

from pairtune.errors import UserError
from pairtune.files import telling

KINDS = {float: ("verdict", "--verdicts"), str: ("answer", "--replies")}  # what a value is, and the file's option


class Kept:
    """A file of replies, held by one process at a time.

    Attributes:
        values: What was asked for, by its question's key: verdicts, or answers.
        addresses: Who replied last, by the question's key; "" where the file does not say.
        requests: How many lines there are: requests that may have been paid for.
        tokens: As endpoints counted them.
    """

    def __init__(self, path: Path, kind: type = float):
        """
        Args:
            kind: float for a judge's verdicts, str for answers.

        Raises:
            UserError: Another process holds it, or it is something else, or cannot be written.
        """
        self.path, self._kind = path.expanduser(), kind
        self._what, option = KINDS[kind]
        self._way_out = f"name another file: {option}"
        with telling(self.path, self._way_out):
            self._file = self.path.open("a+b")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            told = f"another process keeps {self._what}s there; let it end, or {self._way_out}"
            raise UserError(f"{path}: {told}") from None
        self.values: dict[str, float | str] = {}
        self.addresses: dict[str, str] = {}
        self.requests, self.tokens = 0, 0
        self._without: Counter[str] = Counter()
        self._why: dict[str, str] = {}
        self._lock = threading.Lock()
        self._read()

    def _read(self) -> None:
        self._file.seek(0)
        content = self._file.read()
        whole = content[: content.rfind(b"\n") + 1]
        for number, line in enumerate(whole.split(b"\n")[:-1], 1):
            try:
                row = json.loads(line)
                value = row["value"]
                if isinstance(value, str) is not (self._kind is str) and value is not None:
                    raise TypeError
                said = row.get("why", ""), row.get("tokens", 0), row.get("address", "")
                self._count(row["key"], value, *said)
            except (ValueError, TypeError, KeyError):
                told = f"line {number}: is no {self._what} that was kept; {self._way_out}"
                raise UserError(f"{self.path}, {told}") from None
        if whole != content:  # a line that a kill cut
            self._file.truncate(len(whole))

    def add(
        self,
        key: str,
        *,
        value: float | str | None,
        why: str = "",
        address: str = "",
        reply: str = "",
        tokens: int = 0,
    ) -> None:
        """Keeps one reply; it is on the disk when this returns. Threads may call it."""
        row = {"key": key, "value": value, "why": why, "tokens": tokens, "address": address}
        row |= {} if reply == value else {"reply": reply}
        with self._lock:
            self._count(key, value, why, tokens, address)
            with telling(self.path, "make room"):
                self._file.write(json.dumps(row, ensure_ascii=False).encode("utf-8", "replace") + b"\n")
                self._file.flush()
                os.fsync(self._file.fileno())

    def _count(self, key: str, value: float | str | None, why: str, tokens: int, address: str) -> None:
        self.requests += 1
        self.addresses[key] = address
        self.tokens += tokens
        if value is not None:
            self.values[key] = self._kind(value)
        else:
            self._without[key] += 1
            self._why[key] = why

    def without(self, key: str) -> tuple[int, str]:
        """Returns how many replies to a question gave nothing, and why the last one gave none."""
        return self._without[key], self._why.get(key, "")

    def close(self) -> None:
        self._file.close()
