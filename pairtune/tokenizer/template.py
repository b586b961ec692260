"""Conversations to text: a model folder's Jinja template rendered as transformers renders it, or plain text.

A conversation is a list of messages, `{"role", "content"}`, with tool calls, thoughts and the like where it has some.
What becomes of the text is in hf.py.
"""

import json
import shutil
from collections.abc import Mapping
from datetime import date, datetime, time
from functools import cached_property
from pathlib import Path
from typing import Any

import jinja2
from jinja2.ext import Extension

from pairtune.errors import UserError
from pairtune.files import read_object
from pairtune.tokenizer.sandbox import Sandbox

ANSWER_END = "\ue000"  # private use: stands behind an answer to find what a template writes after it
THOUGHTS = ("reasoning_content", "thinking", "reasoning")  # as transformers: the first is what templates read
SPEAKER = {"user": "\n\nHuman: ", "assistant": "\n\nAssistant: ", "tool": "\n\nTool: ", "system": "\n\n"}


class Refusal(UserError):
    """A conversation that a template does not take; `reason` is the first line of what the template says."""

    def __init__(self, message: str, reason: str):
        super().__init__(message)
        self.reason = reason.strip().partition("\n")[0]


class ChatTemplate:
    """A Jinja template with the special tokens it may write, as `{"bos_token": "<s>", ...}`.

    Args:
        day: What strftime_now tells. None: there is no strftime_now, and a template such as Llama 3.2's writes a day
            of its own.
        arguments: What else the template is given, such as enable_thinking; a special token's name overrules it.
    """

    def __init__(
        self, source: str, special: dict[str, str], day: date | None = None, arguments: dict[str, Any] | None = None
    ):
        self.source, self._values = source, {**special, "documents": None, **(arguments or {})}
        self._environment = environment = Sandbox(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, "jinja2.ext.loopcontrols"]
        )
        environment.globals.update(raise_exception=_raise)
        if day:  # not today: a run that is resumed tomorrow, and another process, must read the same tokens
            environment.globals.update(strftime_now=datetime.combine(day, time()).strftime)
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise UserError(f"The chat template is not valid Jinja (line {error.lineno}): {error.message}") from error
        except (SyntaxError, RecursionError) as error:  # of the Python that it becomes: nested too deep
            raise UserError(f"The chat template is not valid Jinja: {error}") from error

    def render(
        self,
        messages: list[dict],
        *,
        add_generation_prompt: bool = False,
        tools: list | None = None,
        arguments: Mapping | None = None,
    ) -> str:
        """Returns the conversation's text.

        Args:
            tools: Descriptions of what may be called.
            arguments: What this conversation gives to the template, beside and before the template's own.

        Raises:
            Refusal: The template refuses the conversation: many know no system role, or want roles to alternate.
            UserError: It needs a day and has none, counts for ever, or writes without end.
        """
        read = self._as_read(messages)
        given = {"messages": read, "tools": tools, "add_generation_prompt": add_generation_prompt}
        values = {**self._values, **(arguments or {}), **given}
        has_more = read is not messages or tools
        size = _characters([messages, tools]) if has_more else sum(len(message["content"]) for message in messages)
        self._environment.budget.begin(size)
        try:
            return self._template.render(**values)
        except UserError:
            raise
        except Exception as error:  # what a template may raise: its own refusals, and all that Python raises
            if isinstance(error, jinja2.UndefinedError) and "strftime_now" in str(error):
                raise UserError(
                    "The chat template writes the day (strftime_now) and knows none without a clock: give it one that "
                    "stays, such as tokenizer.date=2025-01-31, so that a run can be resumed on another day."
                ) from error
            roles = ", ".join(message["role"] for message in messages)
            raise Refusal(
                f"The chat template refuses the conversation ({roles}): {error}. "
                "Remove it, or give a template that takes it: chat_template=FILE.jinja or chat_template=plain.",
                str(error),
            ) from error

    def tail_length(self, messages: list[dict], text: str, **options) -> int:
        """Returns how many characters of `text`, the rendered messages, stand behind what the last message says.

        What it says last, its content or the last tool that it calls, is marked, not searched for: it may be trimmed,
        or be as short as 'e'. Where it stands whole before the tail that the template usually writes, this is its end,
        and one more rendering is spared.

        Args:
            options: As for `render`.
        """
        said = messages[-1].get("content")
        is_text = said and isinstance(said, str) and not messages[-1].get("tool_calls")
        if is_text and self._usual_tail and text.endswith(said + self._usual_tail):
            return len(self._usual_tail)
        marked = self.render([*messages[:-1], _marked_at_end(messages[-1])], **options)
        _, mark, tail = marked.rpartition(ANSWER_END)
        if not mark or not text.endswith(tail):
            what = "tool calls" if messages[-1].get("tool_calls") else "the last assistant message as it is"
            raise Refusal(f"The chat template does not write {what}; give another one.", f"it does not write {what}")
        return len(tail)

    @cached_property
    def _usual_tail(self) -> str:
        """What it writes behind a short answer to a short question; "" where that is nothing, or cannot be told."""
        messages = [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": f"Hello.{ANSWER_END}"}]
        try:
            _, mark, tail = self.render(messages).rpartition(ANSWER_END)
        except UserError:
            return ""
        return tail if mark else ""

    def _as_read(self, messages: list[dict]) -> list[dict]:
        """Returns messages as transformers hands them over: thoughts under each of their names, and nothing that is
        null. Text parts are handed over to a template that reads them; for another they are joined."""
        if all(message.keys() == {"role", "content"} and isinstance(message["content"], str) for message in messages):
            return messages
        read = []
        for message in messages:
            message = {key: value for key, value in message.items() if value is not None}
            thoughts = next((message[key] for key in THOUGHTS if key in message), None)
            if thoughts is not None:
                message = {"thinking": thoughts, **message, "reasoning_content": thoughts}
            if isinstance(message.get("content"), list) and not self._reads_parts:
                message["content"] = "".join(part["text"] for part in message["content"])
            read.append(message)
        return read

    @cached_property
    def _reads_parts(self) -> bool:
        """Whether the template writes a content of two text parts as text, and not as Python prints a list."""
        parts = [{"type": "text", "text": "first words, "}, {"type": "text", "text": "last words"}]
        values = {**self._values, "tools": None, "add_generation_prompt": False}
        self._environment.budget.begin(100)
        try:
            text = self._template.render(**values, messages=[{"role": "user", "content": parts}])
        except Exception:  # boundary: as in render; it reads none
            return False
        return "first words" in text and "last words" in text and "'type'" not in text and '"type"' not in text


def _marked_at_end(message: dict) -> dict:
    calls, content = message.get("tool_calls"), message.get("content")
    if calls:
        function = calls[-1].get("function")
        named = function if isinstance(function, dict) else calls[-1]
        marked = {**named, "name": f"{named.get('name', '')}{ANSWER_END}"}
        last = {**calls[-1], "function": marked} if isinstance(function, dict) else marked
        return {**message, "tool_calls": [*calls[:-1], last]}
    if isinstance(content, list) and content:
        return {**message, "content": [*content[:-1], {**content[-1], "text": content[-1]["text"] + ANSWER_END}]}
    return {**message, "content": (content or "") + ANSWER_END}


def _characters(value) -> int:
    """Returns how many characters there are in the texts of a value."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, (list, tuple)):
        return sum(map(_characters, value))
    if isinstance(value, (dict, Mapping)):  # the first is told at once
        return sum(map(_characters, value.keys())) + sum(map(_characters, value.values()))
    return 0


def plain_text(messages: list[dict], *, add_generation_prompt: bool = False) -> tuple[str, str | None]:
    """Returns prompt and answer as text, the answer None where the last message is no assistant's.

    A question and its answer are joined by a newline; more than a question is written as an HH transcript.

    Raises:
        Refusal: There is more than text: tool calls, or thoughts.
    """
    check_texts(messages, "plain text")
    messages = [{**message, "content": joined(message["content"])} for message in messages]
    answer = None
    if messages[-1]["role"] == "assistant" and not add_generation_prompt:
        *messages, last = messages
        answer = last["content"]
    opened = add_generation_prompt or answer is not None
    if [message["role"] for message in messages] == ["user"]:
        return messages[0]["content"] + ("\n" if opened else ""), answer
    prompt = "".join(SPEAKER[message["role"]] + message["content"] for message in messages)
    if messages and messages[0]["role"] == "system":
        prompt = prompt.removeprefix(SPEAKER["system"])
    return prompt + ("\n\nAssistant:" if opened else ""), answer if answer is None else f" {answer}"


def joined(content: str | list[dict]) -> str:
    """Returns a content as one text."""
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def check_texts(messages: list[dict], style: str, tools: list | None = None) -> None:
    """Raises Refusal where a conversation is more than roles and texts."""
    if tools:
        raise Refusal(f"{style} has no place for tool descriptions. Give a chat template that writes them.",
                      f"{style} has no place for tool descriptions")  # fmt: skip
    for message in messages:
        more = [key for key in message if key in ("tool_calls", *THOUGHTS)]
        if more:
            reason = f"{style} has no place for {more[0].replace('_', ' ')}"
            raise Refusal(f"{reason}. Give a chat template that writes them.", reason)


def choose_template(folder: Path, config: dict, wanted: str | None) -> tuple[str | None, str]:
    """Returns the template's source, None for plain text, and in words where it comes from.

    Args:
        config: The folder's tokenizer_config.json.
        wanted: As in `tokenizer.hf_tokenizer`.
    """
    if wanted is None:
        own = _own_template(folder, config)
        return own or None, "the folder's chat template" if own else "plain text: the tokenizer has no chat template"
    if wanted == "plain":
        return None, "plain text: chat_template=plain"
    if "{{" in wanted or "{%" in wanted:
        return wanted, "the chat template given as text"
    if wanted.endswith(".jinja"):
        file = Path(wanted).expanduser()
        if not file.is_file():
            raise UserError(f"chat_template={wanted}: there is no such file.")
        return _read(file), f"the chat template {file}"
    raise UserError(
        f"chat_template={wanted!r} is neither null (the folder's own), 'plain', a .jinja file, nor a Jinja text."
    )


def set_template(folder: Path, template: str | None) -> None:
    """Makes `template` the one that transformers finds in a folder, None for none; does nothing where it is already."""
    file = folder / "tokenizer_config.json"
    config = read_object(file)
    try:
        if choose_template(folder, config, None)[0] == template:
            return
    except UserError:  # the folder's own is broken, which is why the run was given another
        pass
    for old in folder.glob("chat_template*"):
        old.unlink()
    shutil.rmtree(folder / "additional_chat_templates", ignore_errors=True)
    if "chat_template" in config:
        config.pop("chat_template")
        file.write_text(json.dumps(config, indent=2) + "\n")
    if template is not None:
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"the chat template {file} cannot be read: {error}. It must be text in UTF-8.") from error


def _own_template(folder: Path, config: dict) -> str | None:
    """Returns the template that transformers would use: in files, in tokenizer_config.json, for a processor."""
    files = {"default": folder / "chat_template.jinja"}
    files |= {file.stem: file for file in sorted((folder / "additional_chat_templates").glob("*.jinja"))}
    named = {name: _read(file) for name, file in files.items() if file.is_file()}
    if not named:
        own = config.get("chat_template")
        if own is None:
            own = read_object(folder / "chat_template.json").get("chat_template")
        if own is None or isinstance(own, str):
            return own
        if isinstance(own, list) and all(isinstance(entry, dict) for entry in own):
            own = {entry.get("name"): entry.get("template") for entry in own}
        if not isinstance(own, dict) or not all(isinstance(text, str) for item in own.items() for text in item):
            raise UserError(
                f"{folder}/tokenizer_config.json: chat_template must be text, texts by name, or a list of name and "
                "template."
            )
        named = own
    if "default" not in named:
        names = ", ".join(named)
        raise UserError(
            f"{folder} has chat templates ({names}) but none named default. Save one of them as a .jinja file and "
            "give chat_template=FILE.jinja."
        )
    return named["default"]


class _GenerationTag(Extension):
    """`{% generation %}` marks answers for other trainers; here its body is simply written."""

    tags = {"generation"}

    def parse(self, parser):
        next(parser.stream)
        return jinja2.nodes.Scope(parser.parse_statements(["name:endgeneration"], drop_needle=True))


def _raise(message: str):
    raise jinja2.TemplateError(message)
