"""An OpenAI-compatible endpoint that is asked: OpenAI's, vLLM's, llama.cpp's server.

What a service cannot do now (429, 5xx, a line that is cut) is asked again, waiting ever longer. A reply that does not
give what was asked for, such as a refusal, is asked for again a few times, and then is none. Each is kept as it comes.
"""

import json
import re
import sys
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass

from pairtune.errors import UserError
from pairtune.hub.post import Answer, check_address, key_of_environment, post
from pairtune.hub.replies import Kept
from pairtune.process import console

WAITS = (1, 2, 4, 8, 16, 32, 60)  # seconds before each further try, where the service does not say how many
WITHOUT = 3  # replies that give nothing, after which there is nothing
NOT_ASKED = "the budget of requests is used"
CUT = "the reply is cut short"
THINKS = "cut short within its thoughts"
NO_COMPLETION = "the reply is no chat completion"


@dataclass(frozen=True)
class Terms:
    """What a command calls things, for its messages.

    Attributes:
        command: Who asks.
        wanted: What it is that replies give.
        done: What was done until now.
        address, model, body: Its options; of the address, with a space behind it, or "".
        keys: Variables of the environment, of which the first that is set holds the key.
    """

    command: str
    wanted: str
    done: str
    address: str
    model: str
    body: str
    keys: tuple[str, ...]


@dataclass(frozen=True)
class Limits:
    """How much is asked.

    Attributes:
        budget: Requests that may be paid for, those that are kept included; None for any number.
        at_once: Requests under way at a time.
        timeout_s: Seconds for a reply.
    """

    budget: int | None = None
    at_once: int = 4
    timeout_s: float = 120.0


@dataclass(frozen=True)
class Reply:
    """What was said to a question, and at which address; no value, and why in a few words, where it gives nothing."""

    value: float | str | None
    why: str = ""
    address: str = ""


class _BudgetUsed(Exception):
    """No further request may be sent."""


class _Stopped(Exception):
    """Another question has failed for good."""


class Client:
    """An endpoint behind an address.

    Attributes:
        kept: Where its replies are kept.
        is_budget_used: Whether something was not asked for that reason.
        has_answered: Whether it has ever answered such a request: then one that it refuses is at fault by itself.
        again: Why requests were sent again in this call, and how many.
    """

    def __init__(self, address: str, kept: Kept, limits: Limits, terms: Terms, read: Callable[[str, str], Reply]):
        """
        Args:
            address: The base, such as http://127.0.0.1:8000/v1. The key is the environment's.
            read: From a completion's text, and what is wrong with it ("" for nothing), to what it gives.

        Raises:
            UserError: The address or the key cannot be used. The message does not show the key.
        """
        self.address = check_address(address, terms.address, terms.keys)
        self.kept, self._limits, self._terms, self._read = kept, limits, terms, read
        self._url, self._key = f"{self.address}/chat/completions", key_of_environment(terms.keys)
        self._lock, self._stopping = threading.Lock(), threading.Event()
        self._spent, self._told = kept.requests, set()
        self.is_budget_used, self.has_answered = False, False
        self.again: Counter[str] = Counter()

    @property
    def budget(self) -> int | None:
        """Requests that may be paid for, those of `kept` included."""
        return self._limits.budget

    def ask(self, bodies: Mapping[str, bytes]) -> dict[str, Reply]:
        """Returns what is said to each body of a request, by its key; what is kept already is not asked.

        A Ctrl-C waits for replies under way: they are paid for, and are kept.

        Raises:
            UserError: The endpoint refuses, or does not answer for minutes; what it said until then is kept.
        """
        found = {key: reply for key in bodies if (reply := self._known(key)) is not None}
        self.has_answered |= bool(found)
        missing = {key: body for key, body in bodies.items() if key not in found}
        with ThreadPoolExecutor(self._limits.at_once) as pool:
            asked = {pool.submit(self._ask, key, body): key for key, body in missing.items()}
            try:
                with console.Progress(self._terms.wanted, len(asked), shown=len(asked) > 1) as progress:
                    for future in as_completed(asked):
                        found[asked[future]] = future.result()
                        progress.update(1)
            except KeyboardInterrupt:
                print(f"\n{self._terms.command}: waiting for replies that are under way", file=sys.stderr)
                raise
            finally:
                self._stopping.set()
                pool.shutdown(wait=True, cancel_futures=True)
                self._stopping.clear()
        return found

    def _known(self, key: str) -> Reply | None:
        """What is known of a question without asking."""
        if key in self.kept.values:
            return Reply(self.kept.values[key], address=self.kept.addresses[key])
        times, why = self.kept.without(key)
        return Reply(None, why, self.kept.addresses[key]) if times >= WITHOUT else None

    def _ask(self, key: str, body: bytes) -> Reply:
        try:
            waits = [*WAITS]
            while True:
                answer = self._try(key, body)
                if (reply := self._known(key)) is not None:
                    return reply
                if answer.refused:
                    return self._refused(answer)
                if answer.busy and (not waits or (answer.unsent and not self.has_answered)):  # nobody is there
                    raise self._gives_up(answer)
                with self._lock:
                    self.again[answer.told if answer.status in (0, 200) else str(answer.status)] += 1
                if answer.busy:
                    seconds = waits.pop(0)
                    self._wait(answer, seconds if answer.retry_after is None else answer.retry_after)
        except (_BudgetUsed, _Stopped):
            return Reply(None, NOT_ASKED)
        except BaseException:
            self._stopping.set()  # the others ask no more
            raise

    def _try(self, key: str, body: bytes) -> Answer:
        """Sends one request, if the budget has one, and keeps what comes back where it may be paid for."""
        with self._lock:
            if self._stopping.is_set():
                raise _Stopped
            if self.budget is not None and self._spent >= self.budget:
                self.is_budget_used = True
                raise _BudgetUsed
            self._spent += 1
        answer = post(self._url, body, self._key, self._limits.timeout_s)
        self.has_answered |= answer.status == 200
        if answer.status == 200:
            text, tokens, why = read_completion(answer.content)
            reply = self._read(text, why)
            said = {"address": self.address, "reply": text, "tokens": tokens}
            self.kept.add(key, value=reply.value, why=reply.why, **said)
            return Answer(200, told=reply.why)
        if not answer.status and not answer.unsent:
            self.kept.add(f"lost {key}", value=None, why=answer.told)
        else:  # nobody is paid for it
            with self._lock:
                self._spent -= 1
        return answer

    def _refused(self, answer: Answer) -> Reply:
        """Of what will not be answered however often it is asked; where nothing was answered yet, all may be so."""
        told, terms = f"{self._url}: answers {answer.status}: {answer.told}", self._terms
        if answer.status in (401, 403):
            has = "does not take the key" if self._key else "wants a key"
            raise UserError(f"{told}; it {has}: set {', or '.join(terms.keys)}, in the environment")
        if answer.status in (404, 405) or 300 <= answer.status < 400:
            raise UserError(f"{told}; are the address, which as a rule ends in /v1, and {terms.model} right?")
        if not self.has_answered:
            way_out = f"{terms.body} sets what else is sent: '{{\"temperature\": null}}' leaves that out"
            raise UserError(f"{told}; {way_out}")
        return Reply(None, f"answered with {answer.status}", self.address)

    def _gives_up(self, answer: Answer) -> UserError:
        again = f"{self._terms.done} is in {self.kept.path}, and the same command goes on from there"
        if answer.status:
            return UserError(f"{self._url}: answers {answer.status} again and again: {answer.told}; {again}")
        return UserError(f"{self._url}: cannot be reached: {answer.told}; is the server up? {again}")

    def _wait(self, answer: Answer, seconds: float) -> None:
        what = str(answer.status or answer.told)
        with self._lock:
            is_new = what not in self._told
            self._told.add(what)
        if is_new:
            told = f"{self._terms.command}: {what}: asking again in {seconds:g} s, and so whenever it is"
            print(told, file=sys.stderr)
        if self._stopping.wait(seconds):
            raise _Stopped


def read_completion(content: bytes) -> tuple[str, int, str]:
    """Returns a chat completion's text, its number of tokens, and what is wrong with it, "" for nothing."""
    try:
        found = json.loads(content)
        (choice, *_), usage = found["choices"], found.get("usage") or {}
        message, tokens = choice["message"], usage.get("total_tokens")
        text, end = message.get("content"), choice.get("finish_reason")
        if isinstance(text, list):  # in parts
            text = "".join(part.get("text", "") for part in text)
        if not isinstance(text, str | None):
            raise TypeError
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return content.decode("utf-8", "replace")[:2000], 0, NO_COMPLETION
    text, tokens = text or "", tokens if isinstance(tokens, int) else 0
    if message.get("refusal") or end == "content_filter":
        return str(message.get("refusal") or text), tokens, "refused"
    answer = re.sub(r"(?s)^.*</think>\s*", "", text)
    # A reasoning parser takes thoughts out of the text: then nothing is left of it
    if (text.lstrip().startswith("<think>") and answer == text) or (end == "length" and not answer.strip()):
        return text, tokens, THINKS
    return answer, tokens, CUT if end == "length" else ""


def spent(client: Client, option: str) -> list[str]:
    """Returns what an endpoint was asked so far, in lines.

    Args:
        option: The budget's.
    """
    kept = client.kept
    lines = [f"{kept.path}: {kept.requests:,} requests, {kept.tokens:,} tokens, all calls together"]
    if client.again:
        lines.append(f"asked again: {', '.join(f'{count:,} ({why})' for why, count in client.again.most_common())}")
    if client.is_budget_used:
        lines.append(f"{option} {client.budget:,} is used; the same command with a larger one asks the rest")
    return lines
