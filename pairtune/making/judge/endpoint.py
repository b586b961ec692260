"""A judge behind an OpenAI-compatible endpoint: which rubric it is given, and what its replies say."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pairtune.hub.endpoint import Client, Limits, Reply, Terms
from pairtune.hub.replies import Kept
from pairtune.making.judge import rubric as rubrics
from pairtune.making.judge.question import Question, Said

TERMS = Terms(
    command="judge",
    wanted="verdicts",
    done="what was judged",
    address="--judge ",
    model="--judge-model",
    body="--judge-body",
    keys=("JUDGE_API_KEY", "OPENAI_API_KEY"),
)


@dataclass(frozen=True)
class Asking:
    """How an endpoint is asked.

    Attributes:
        model: The judge's name there.
        kept: Where replies are kept.
        rubric: As rubric.read_rubric returns it.
        limits: How much is asked.
        body: Keys of the request beside `model` and `messages`.
    """

    model: str
    kept: Kept
    rubric: str = rubrics.RUBRIC
    limits: Limits = Limits()
    body: Mapping[str, Any] = field(default_factory=lambda: {"temperature": 0})


class Endpoint:
    """A judge behind an address.

    Attributes:
        client: Whom it asks.
    """

    def __init__(self, address: str, asking: Asking):
        """
        Raises:
            UserError: The address, or the environment's key, cannot be used.
        """
        self.client = Client(address, asking.kept, asking.limits, TERMS, self._verdict)
        self.name = f"{asking.model} at {self.client.address}"
        self.compares = rubrics.compares(asking.rubric)
        self._asking = asking

    @property
    def kept(self) -> Kept:
        """Where its replies are kept."""
        return self._asking.kept

    def judge(self, questions: Sequence[Question]) -> list[Said]:
        """Returns a verdict on each question; each that is not kept yet is asked once, however often it stands here.

        Raises:
            UserError: See Client.ask.
        """
        bodies = [self._body(question) for question in questions]
        keys = [hashlib.sha256(body).hexdigest() for body in bodies]
        said = self.client.ask(dict(zip(keys, bodies, strict=True)))
        return [Said(said[key].value, said[key].why) for key in keys]

    def _body(self, question: Question) -> bytes:
        """A request; it tells its question, so that its digest is the question's key."""
        messages = [{"role": "user", "content": rubrics.fill(self._asking.rubric, question)}]
        body = {"model": self._asking.model, "messages": messages, **self._asking.body}
        return json.dumps({name: value for name, value in body.items() if value is not None}, sort_keys=True).encode()

    def _verdict(self, text: str, why: str) -> Reply:
        value = None if why else rubrics.read_reply(self._asking.rubric, text)
        return Reply(value, why or ("the reply has no verdict" if value is None else ""))
