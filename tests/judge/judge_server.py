"""An OpenAI-compatible endpoint on 127.0.0.1 that judges by a rule, draws by a seed, and misbehaves as it is told."""

import json
import re
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

TEXTS = re.compile(r"\[First answer\]\n(.*)\n\n\[Second answer\]\n(.*)\n\n\[End\]", re.DOTALL)


def longer(first: str, second: str) -> str:
    return "tie" if len(first) == len(second) else "first" if len(first) > len(second) else "second"


class Server:
    """What was asked and said.

    Attributes:
        rule: From both answers, in the order in which they were shown, to the winner.
        odd: Odd things to do, one a request; then it is well-behaved. With only_when_new, to a question's first only.
        asked: Each request's body, read.
        judged: Both answers of each request that was answered with a verdict.
        drawn: Each request that was answered with an answer, in place of a verdict.
        headers: Of the last request.
    """

    def __init__(self, rule: Callable[[str, str], str], odd: list):
        self.rule, self.odd, self.lock = rule, list(odd), threading.Lock()
        self.asked: list[dict] = []
        self.judged: list[tuple[str, str]] = []
        self.questions: list[str] = []  # of these, whole
        self.drawn: list[dict] = []
        self.headers: dict[str, str] = {}
        self.address, self.only_when_new = "", False


def drawn(body: dict) -> str:
    """What it answers: of four different texts one, by the seed, or the first where none is sent."""
    return f"{body['messages'][-1]['content']} w{3 + body.get('seed', 0) % 4}"


def completion(text: str, *, finish: str = "stop", **more) -> bytes:
    choice = {"message": {"role": "assistant", "content": text, **more}, "finish_reason": finish}
    return json.dumps({"choices": [choice], "usage": {"total_tokens": 10}}).encode()


class _Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        known, length = self.server.known, int(self.headers["Content-Length"])
        body = json.loads(self.rfile.read(length))
        with known.lock:
            is_new = body not in known.asked or not known.only_when_new
            known.asked.append(body)
            known.headers = dict(self.headers)
            odd = known.odd.pop(0) if known.odd and is_new else None
        if callable(odd):
            return odd(self)
        if isinstance(odd, int):
            return self.reply(odd, f"busy, {self.headers.get('Authorization')}".encode(), {"Retry-After": "0"})
        if odd is not None:
            return self.reply(200, odd)
        question = body["messages"][-1]["content"]
        texts = TEXTS.search(question)
        with known.lock:
            if texts is None:
                known.drawn.append(body)
                return self.reply(200, completion(drawn(body)))
            known.judged.append(texts.groups())
            known.questions.append(question)
        self.reply(200, completion(f'I think so.\n{{"winner": "{known.rule(*texts.groups())}"}}'))

    def reply(self, status: int, content: bytes, headers: dict | None = None, *, cut: int = 0):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content[: len(content) - cut])

    def log_message(self, *args):
        pass


class _Listening(ThreadingHTTPServer):
    def handle_error(self, request, client_address):
        """Of a client that was killed nothing is told."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


@contextmanager
def serving(rule: Callable[[str, str], str] = longer, odd: list = ()) -> Iterator[Server]:
    server = _Listening(("127.0.0.1", 0), _Handler)
    server.known = Server(rule, odd)
    server.known.address = f"http://127.0.0.1:{server.server_port}/v1"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server.known
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


# What it may do in the place of an answer


def cut(handler):
    handler.reply(200, completion('{"winner": "first"}'), cut=9)


def cut_without_length(handler):
    handler.send_response(200)
    handler.end_headers()
    handler.wfile.write(completion('{"winner": "first"}')[:-9])


def silent(handler):
    handler.close_connection = True


def elsewhere(handler):
    handler.reply(302, b"", {"Location": "http://127.0.0.1:9/"})


def slow(handler):
    handler.connection.settimeout(10)
    handler.rfile.read(1)  # until the other side has gone


NO_COMPLETION = [429, 503, 500, cut, silent, cut_without_length, b"<html>", b"{}", b'{"choices": []}', 429, 502, cut]
