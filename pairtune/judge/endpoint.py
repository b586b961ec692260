"""A judge behind an OpenAI-compatible endpoint: OpenAI's, vLLM's, llama.cpp's server.

What a service cannot do now (429, 5xx, a line that is cut) is asked again, waiting ever longer. A reply without a
verdict, such as a refusal, is asked again a few times, and then is none. Each reply is kept as it comes.
"""

import hashlib
import json
import re
import sys
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any

from pairtune import console
from pairtune.errors import UserError
from pairtune.judge import rubric as rubrics
from pairtune.judge.http import Answer, check_address, key_of_environment, post
from pairtune.judge.kept import Kept
from pairtune.judge.question import Question, Said

WAITS = (1, 2, 4, 8, 16, 32, 60)  # seconds before each further try, where the service does not say how many
WITHOUT = 3  # replies without a verdict, after which there is none
NOT_ASKED = "the budget of requests is used"


@dataclass(frozen=True)
class Asking:
    """How an endpoint is asked.

    Attributes:
        model: The judge's name there.
        kept: Where replies are kept.
        rubric: As rubric.read_rubric returns it.
        budget: Requests that may be paid for, those that `kept` has included; None for any number.
        at_once: Requests under way at a time.
        body: Keys of the request beside `model` and `messages`.
        timeout_s: Seconds for a reply.
    """

    model: str
    kept: Kept
    rubric: str = rubrics.RUBRIC
    budget: int | None = None
    at_once: int = 4
    body: Mapping[str, Any] = field(default_factory=lambda: {"temperature": 0})
    timeout_s: float = 120.0


class _BudgetUsed(Exception):
    """No further request may be sent."""


class _Stopped(Exception):
    """Another question has failed for good."""


class Endpoint:
    """A judge behind an address."""

    def __init__(self, address: str, asking: Asking, key: str | None):
        self.name = f"{asking.model} at {address}"
        self.compares = rubrics.compares(asking.rubric)
        self._url, self._asking, self._key = f"{address}/chat/completions", asking, key
        self._lock, self._stopping = threading.Lock(), threading.Event()
        self._spent, self._has_answered, self._told = asking.kept.requests, False, set()
        self.is_budget_used = False

    @property
    def kept(self) -> Kept:
        """Where its replies are kept."""
        return self._asking.kept

    @property
    def budget(self) -> int | None:
        """Requests that may be paid for, those of `kept` included."""
        return self._asking.budget

    @classmethod
    def open(cls, address: str, asking: Asking) -> "Endpoint":
        """Returns the judge at a base address, such as http://127.0.0.1:8000/v1, with the environment's key.

        Raises:
            UserError: The address or the key cannot be used. The message does not show the key.
        """
        return cls(check_address(address), asking, key_of_environment())

    def judge(self, questions: Sequence[Question]) -> list[Said]:
        """Returns a verdict on each question; each that is not kept yet is asked once, however often it stands here.

        Raises:
            UserError: The endpoint refuses, or does not answer for minutes; what it said until then is kept.
        """
        bodies = [self._body(question) for question in questions]
        keys = [hashlib.sha256(body).hexdigest() for body in bodies]
        missing = {key: body for key, body in zip(keys, bodies, strict=True) if self._known(key) is None}
        said = self._ask_all(missing)
        return [self._known(key) or said[key] for key in keys]

    def _body(self, question: Question) -> bytes:
        """A request; it tells its question, so that its digest is the question's key."""
        messages = [{"role": "user", "content": rubrics.fill(self._asking.rubric, question)}]
        body = {"model": self._asking.model, "messages": messages, **self._asking.body}
        return json.dumps({name: value for name, value in body.items() if value is not None}, sort_keys=True).encode()

    def _known(self, key: str) -> Said | None:
        """What is known of a question without asking."""
        if key in self.kept.values:
            return Said(self.kept.values[key])
        times, why = self.kept.without(key)
        return Said(None, why) if times >= WITHOUT else None

    def _ask_all(self, bodies: Mapping[str, bytes]) -> dict[str, Said]:
        """Returns what was said to each. A Ctrl-C waits for replies under way: they are paid for, and are kept."""
        found: dict[str, Said] = {}
        with ThreadPoolExecutor(self._asking.at_once) as pool:
            asked = {pool.submit(self._ask, key, body): key for key, body in bodies.items()}
            try:
                with console.Progress("verdicts", len(asked), shown=len(asked) > 1) as progress:
                    left = set(asked)
                    while left:
                        done, left = wait(left, return_when=FIRST_COMPLETED)
                        for future in done:
                            found[asked[future]] = future.result()
                            progress.update(1)
            except KeyboardInterrupt:
                print("\njudge: waiting for replies that are under way", file=sys.stderr)
                raise
            finally:
                self._stopping.set()
                pool.shutdown(wait=True, cancel_futures=True)
                self._stopping.clear()
        return found

    def _ask(self, key: str, body: bytes) -> Said:
        try:
            waits = [*WAITS]
            while True:
                answer = self._try(key, body)
                if (said := self._known(key)) is not None:
                    return said
                if answer.refused:
                    return self._refused(answer)
                if answer.busy:
                    if not waits or (answer.unsent and not self._has_answered):  # nobody is there
                        raise self._gives_up(answer)
                    seconds = waits.pop(0)
                    self._wait(answer, seconds if answer.retry_after is None else answer.retry_after)
        except (_BudgetUsed, _Stopped):
            return Said(None, NOT_ASKED)
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
        answer = post(self._url, body, self._key, self._asking.timeout_s)
        self._has_answered |= answer.status == 200
        if answer.status == 200:
            text, tokens, why = read_completion(answer.content)
            value = None if why else rubrics.read_reply(self._asking.rubric, text)
            why = why or ("the reply has no verdict" if value is None else "")
            self.kept.add(key, value=value, why=why, reply=text, tokens=tokens)
        elif not answer.status and not answer.unsent:
            self.kept.add(f"lost {key}", value=None, why=answer.told)
        else:  # nobody is paid for it
            with self._lock:
                self._spent -= 1
        return answer

    def _refused(self, answer: Answer) -> Said:
        """Of what will not be answered however often it is asked; where nothing was answered yet, all may be so."""
        told = f"{self._url}: answers {answer.status}: {answer.told}"
        if answer.status in (401, 403):
            has = "does not take the key" if self._key else "wants a key"
            raise UserError(f"{told}; it {has}: set JUDGE_API_KEY, or OPENAI_API_KEY, in the environment")
        if answer.status in (404, 405) or 300 <= answer.status < 400:
            raise UserError(f"{told}; are the address, which as a rule ends in /v1, and --judge-model right?")
        if not self._has_answered:
            raise UserError(f"{told}; --judge-body sets what else is sent: '{{\"temperature\": null}}' leaves that out")
        return Said(None, f"answered with {answer.status}")

    def _gives_up(self, answer: Answer) -> UserError:
        again = f"what was judged is in {self.kept.path}, and the same command goes on from there"
        if answer.status:
            return UserError(f"{self._url}: answers {answer.status} again and again: {answer.told}; {again}")
        return UserError(f"{self._url}: cannot be reached: {answer.told}; is the server up? {again}")

    def _wait(self, answer: Answer, seconds: float) -> None:
        what = str(answer.status or answer.told)
        with self._lock:
            is_new = what not in self._told
            self._told.add(what)
        if is_new:
            print(f"judge: {what}: asking again in {seconds:g} s, and so whenever it is", file=sys.stderr)
        if self._stopping.wait(seconds):
            raise _Stopped


def read_completion(content: bytes) -> tuple[str, int, str]:
    """Returns a chat completion's text, its number of tokens, and what is wrong with it, "" for nothing."""
    try:
        found = json.loads(content)
        (choice, *_), usage = found["choices"], found.get("usage") or {}
        message, tokens = choice["message"], usage.get("total_tokens")
        text = message.get("content") or ""
    except (ValueError, TypeError, KeyError, AttributeError):
        return content.decode("utf-8", "replace")[:2000], 0, "the reply is no chat completion"
    tokens = tokens if isinstance(tokens, int) else 0
    if isinstance(text, list):  # in parts
        text = "".join(part.get("text", "") for part in text if isinstance(part, dict))
    if message.get("refusal") or choice.get("finish_reason") == "content_filter":
        return str(message.get("refusal") or text), tokens, "refused"
    why = "the reply is cut short" if choice.get("finish_reason") == "length" else ""
    return re.sub(r"(?s)^.*</think>", "", text), tokens, why
