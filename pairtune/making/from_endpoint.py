"""Several answers to each prompt, drawn by an OpenAI-compatible endpoint: vLLM's, llama.cpp's, a service's. No torch.

Each answer is a request with a seed of its own. Replies are kept as they come, apart from the rows: whoever is stopped
goes on at the answer, also at another address, and pays again only for what was under way when a process was killed.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pairtune.errors import UserError
from pairtune.hub.endpoint import CUT, NOT_ASKED, Client, Limits, Reply, Terms
from pairtune.hub.replies import Kept
from pairtune.making.sample import Drawn, append, checked, cut, held, seed_of

TERMS = Terms(
    command="sample",
    wanted="answers",
    done="what was drawn",
    address="",
    model="--model",
    body="--body",
    keys=("SAMPLE_API_KEY", "OPENAI_API_KEY"),
)
OF_OPTIONS = {"temperature": "temperature", "top_p": "top_p", "seed": "seed", "max_tokens": "max_new_tokens"}


@dataclass(frozen=True)
class Request:
    """How answers are drawn. Rows keep it, and a file goes on with the same one only.

    Attributes:
        model: Its name there.
        count: Answers to each prompt.
        seed: Of what is drawn: each answer's own one comes of it.
        max_new_tokens, temperature, top_p: As endpoints take them.
        system: A message before each prompt.
        body: What else is sent; null for what is not.
    """

    model: str
    count: int
    seed: int
    max_new_tokens: int
    temperature: float
    top_p: float | None = None
    system: str | None = None
    body: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        """
        Raises:
            UserError: `body` says what another one says.
        """
        for key, option in OF_OPTIONS.items():
            if self.body.get(key) is not None:
                raise UserError(
                    f"--body: {key} is set by --{option.replace('_', '-')}; null leaves it out: "
                    f"'{json.dumps({key: None})}'"
                )

    def seeds(self, row: int) -> list[int]:
        """Returns the seeds of a row's answers: 31 bits, which every endpoint takes."""
        return [seed_of(self.seed, row, n) >> 32 for n in range(self.count)]

    def to_send(self, prompt: str | Sequence[Mapping], seed: int) -> dict[str, Any]:
        """Returns a request for one answer to a prompt."""
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [*prompt]
        if self.system:
            messages = [{"role": "system", "content": self.system}, *messages]
        said = {key: seed if key == "seed" else getattr(self, name) for key, name in OF_OPTIONS.items()}
        sent = {"model": self.model, "messages": messages, **said, **self.body}
        return {name: value for name, value in sent.items() if value is not None}


def open_endpoint(address: str, kept: Kept, limits: Limits) -> Client:
    """Returns an endpoint that draws answers.

    Args:
        kept: Of answers: Kept(path, str).

    Raises:
        UserError: The address, or the environment's key, cannot be used.
    """
    return Client(address, kept, limits, TERMS, _answer)


def _answer(text: str, why: str) -> Reply:
    """An answer that ends after as many tokens as it may have is one, as a model's here is."""
    return Reply(text) if why in ("", CUT) else Reply(None, why)


def sample_from(client: Client, rows: Sequence[Mapping], path: Path, request: Request) -> Drawn:
    """Draws `request.count` answers to each row's prompt; a JSONL file then has each row with `answers`, as `sample`.

    An answer that is refused again and again is left out of its row. Where the budget ends before, the file has the
    rows until there, and the same call goes on.

    Args:
        client: From `open_endpoint`.
        rows: With `prompt`, a text or messages; what else they have is kept.

    Raises:
        UserError: The file holds something else, or answers that were drawn otherwise; another process has it; or the
            endpoint cannot be asked. What it said is kept.
    """
    with held(path) as (file, known):
        done = checked(known, rows, path, asdict(request))
        cut(file, done)
        found = [row["answers"] for row in known]
        client.has_answered |= any(found)
        keys, bodies = _questions(rows, done, request)
        said = client.ask(bodies)
        of_rows = [[said[key] for key in of_row] for of_row in keys]
        whole = next((n for n, some in enumerate(of_rows) if any(r.why == NOT_ASKED for r in some)), len(of_rows))
        lines = []
        for n, replies in enumerate(of_rows[:whole], done):
            kept = [(reply.value, seed) for reply, seed in zip(replies, request.seeds(n), strict=True)]
            answers, seeds = [value for value, _ in kept if value is not None], [s for v, s in kept if v is not None]
            by = dict.fromkeys(reply.address for reply in replies if reply.address)  # a server may have moved
            how = {**asdict(request), "endpoint": ", ".join(by)}
            how |= {} if "seed" in request.body else {"seeds": seeds}
            lines.append({**rows[n], "answers": answers, "drawn": how})
            found.append(answers)
        append(file, lines)
    missing = sum(request.count - len(answers) for answers in found)
    return Drawn.of(found, done, missing=missing, unasked=len(rows) - len(found))


def _questions(rows: Sequence[Mapping], start: int, request: Request) -> tuple[list[list[str]], dict[str, bytes]]:
    """Returns the keys of each row's answers, and what is sent for each key.

    Where no seeds are sent, several requests are one text: a key also says the how-manieth it is.
    """
    keys, bodies, times = [], {}, Counter()
    for n, row in enumerate(rows):
        of_row = []
        for seed in request.seeds(n):
            body = json.dumps(request.to_send(row["prompt"], seed), sort_keys=True).encode()
            times[body] += 1
            key = hashlib.sha256(b"%d %s" % (times[body], body)).hexdigest()
            of_row.append(key)
            if n >= start:
                bodies[key] = body
        keys.append(of_row)
    return keys[start:], bodies
