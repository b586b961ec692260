"""Conversations to tokens: Hugging Face model folders and torchtune's tokenizers behind one interface.

A conversation is rendered whole, and with an answer at its end it ends in exactly one end token. Nothing here pads or
masks, so a pad token that is also the end token harms nothing. Where the answer begins is for data.py to say.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from datetime import date as Date
from inspect import signature
from pathlib import Path
from typing import NamedTuple

import tokenizers

from pairtune.errors import UserError
from pairtune.files import read_object
from pairtune.tokenizer.files import model_stop_ids, read_backend, special_tokens
from pairtune.tokenizer.pieces import Encoded, PieceEncoder
from pairtune.tokenizer.special_text import SpecialText
from pairtune.tokenizer.template import ChatTemplate, Refusal, check_texts, choose_template, joined, plain_text

# Special tokens that end a turn in one family of models or another; a folder names only some of them as its eos.
END_OF_TURN = (
    *("<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<end_of_turn>", "<|end|>", "<|eot|>", "<turn|>", "<|return|>"),
    *("<|end_of_turn|>", "<|END_OF_TURN_TOKEN|>", "<|end_of_text|>", "<|endoftext|>"),
    *("<|call|>", "<|tool_response>"),  # of a turn that calls a tool
)
SENTENCEPIECE_CONTROL = ("<s>", "</s>", "<bos>", "<eos>")  # special tokens, though Phi 3's folder says not of </s>
POLICIES = ("text", "control")  # what a special token's text in a message becomes


class Rendered(NamedTuple):
    """A conversation's tokens, and its text as a template wrote it; None where no template did."""

    tokens: list[int]
    text: str | None


class HFTokenizer:
    """A Hugging Face tokenizer with its chat template, or with plain text where there is none: see `hf_tokenizer`.

    Attributes:
        folder: Where its files are; `files` are those that an export takes from elsewhere: none.
        bos_id, pad_id: None where the folder names none.
        unknown_id: The token of what the vocabulary cannot write; None where it can write all.
        stop_ids: Where generation stops: eos first, then what generation_config.json and the template add.
        end_ids: stop_ids and every other token known to end a turn; end_texts: how they are written.
        vocab_size: The largest id plus one: ids may have gaps.
        chat_template: Jinja text, None for plain text.
        style: How conversations are written, in words.
        date: What the template takes for today; None: the template's own, if it writes one.
        special_tokens_in_text: See `hf_tokenizer`.
    """

    files = ()

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        special: dict[str, str],
        *,
        stop_ids: list[int],
        add_bos: bool,
        template: str | None,
        style: str,
        special_tokens_in_text: str = "text",
        date: Date | None = None,
        arguments: dict | None = None,
        folder: Path | None = None,
    ):
        given = {name: value for name, value in locals().items() if name not in ("self", "backend", "folder")}
        self._given = json.dumps(given, default=str, sort_keys=True)
        self.vocab_size = 1 + max(backend.get_vocab(with_added_tokens=True).values())
        self.bos_id, self.eos_id, self.pad_id = (
            backend.token_to_id(special.get(key, "")) for key in ("bos_token", "eos_token", "pad_token")
        )
        self.unknown_id = _unknown_id(backend)
        turn_ends = {name: backend.token_to_id(name) for name in END_OF_TURN if backend.token_to_id(name) is not None}
        written = [token for name, token in turn_ends.items() if template and name in template]
        self.stop_ids = _distinct([self.eos_id, *stop_ids, *written])
        self.end_ids = frozenset([*self.stop_ids, *turn_ends.values()])
        self.end_texts = [text for text in map(backend.id_to_token, sorted(self.end_ids)) if text]
        self.chat_template, self.style, self.is_plain = template, style, template is None
        self.date, self.folder = date, folder
        self._template = None if template is None else ChatTemplate(template, special, date, arguments)
        self._backend, self._add_bos = backend, add_bos
        self._pieces = PieceEncoder(backend)
        added = backend.get_added_tokens_decoder().items()
        control = {i for i, token in added if token.special or token.content in SENTENCEPIECE_CONTROL}
        control |= self.end_ids | ({self.bos_id} - {None})
        self.special_tokens_in_text = special_tokens_in_text
        self._special_text = SpecialText(backend, {text: i for i in control if (text := backend.id_to_token(i))})

    def digest(self) -> str:
        """Returns 16 digits that stand for all that it makes tokens by, wherever its files are."""
        return hashlib.sha256((self._given + self._backend.to_str()).encode("utf-8", "surrogatepass")).hexdigest()[:16]

    def encode(self, text: str) -> list[int]:
        """Returns the text's tokens; none is added, and special tokens written in it become what the option says."""
        return self._encode(self._marked(text), text).ids

    def holds_special(self, text: str) -> bool:
        """Says whether a special token is written in the text."""
        return self._special_text.is_in(text)

    def special_texts_in(self, text: str) -> list[str]:
        """Returns the special tokens that are written in a text, without those that begin or end one."""
        ends = {self._backend.id_to_token(i) for i in self.end_ids | {self.bos_id} if i is not None}
        return [token for token in self._special_text.found_in(text) if token not in ends]

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        """Returns the tokens' text."""
        return self._backend.decode(ids, skip_special_tokens=skip_special_tokens)

    def render(
        self,
        messages: list[dict],
        *,
        add_generation_prompt: bool = False,
        tools: list | None = None,
        arguments: Mapping | None = None,
    ) -> list[int]:
        """Returns the tokens of a conversation, `[{"role", "content"}, ...]`, with BOS exactly as the template has it.

        Behind a last assistant message stands exactly one end token: the template's first one, or eos where it writes
        none; what the template writes after it is cut. With `add_generation_prompt` nothing is cut or added.

        Args:
            tools, arguments: What the template is given besides: descriptions of tools, and such as enable_thinking.
        """
        return self.rendered(
            messages, add_generation_prompt=add_generation_prompt, tools=tools, arguments=arguments
        ).tokens

    def rendered(
        self,
        messages: list[dict],
        *,
        add_generation_prompt: bool = False,
        tools: list | None = None,
        arguments: Mapping | None = None,
    ) -> "Rendered":
        """Returns what `render` does, and the text that the template has written."""
        if self.is_plain:
            check_texts([], "plain text", tools)
            prompt, answer = plain_text(messages, add_generation_prompt=add_generation_prompt)
            return Rendered(self.render_text(prompt, answer), None)
        options = {"add_generation_prompt": add_generation_prompt, "tools": tools, "arguments": arguments}
        text = self._template.render(messages, **options)
        marked, marked_tools = self._marked_in(messages), self._marked_in(tools)
        marked_options = {**options, "tools": marked_tools}
        alike = marked == messages and marked_tools == tools
        marked_text = text if alike else self._template.render(marked, **marked_options)
        encoding = self._encode(marked_text, text)
        if add_generation_prompt or messages[-1]["role"] != "assistant":
            return Rendered(encoding.ids, text)
        answer_stop = len(marked_text) - self._template.tail_length(marked, marked_text, **marked_options)
        # An end token written in the answer is content: only tokens behind it are looked at.
        tail_start = encoding.num_before(answer_stop)
        return Rendered(_end_once(encoding.ids, tail_start, self), text)

    def render_text(self, prompt: str, answer: str | None = None) -> list[int]:
        """Returns the tokens of prompt + answer as one text: BOS if the tokenizer adds it, eos after an answer."""
        ids = self.encode(prompt + (answer or ""))
        if self._add_bos and ids[:1] != [self.bos_id]:  # the text may bring its own BOS
            ids = [self.bos_id, *ids]
        return ids if answer is None else [*ids, self.eos_id]

    def _marked(self, text: str) -> str:
        return self._special_text.mark(text) if self.special_tokens_in_text == "text" else text

    def _marked_in(self, value):
        """Returns messages or tools whose texts are marked, all but roles."""
        if isinstance(value, str):
            return self._marked(value)
        if isinstance(value, dict):
            return {key: item if key == "role" else self._marked_in(item) for key, item in value.items()}
        return [self._marked_in(item) for item in value] if isinstance(value, list) else value

    def _encode(self, marked: str, text: str) -> Encoded:
        """Returns the tokens of a text, and their places in it with its marks, if it has any."""
        try:
            if marked == text:
                return self._pieces.encode(text)
            encoding, encoded = self._special_text.encode(marked, text), Encoded()
            encoded.add(encoding.ids, 0, len(marked), lambda: encoding.offsets)
            return encoded
        except UserError:
            raise
        except Exception as error:  # the library raises bare Exception
            raise UserError(f"tokenizer.json cannot write this text as tokens: {error}") from error


class TorchtuneTokenizer:
    """torchtune's own tokenizers behind HFTokenizer's interface; their template is what `tokenize_messages` writes.

    Args:
        files: Those that it was read from. An export has them beside the base's tokenizer files: `folder` is None.
    """

    is_plain, chat_template, special_tokens_in_text, date, folder = False, None, "text", None, None
    _PROBES = ("Yes", "No", "0")  # answers that share no token at either end
    _SENTENCEPIECE_ENDS = ("</s>", "<eos>")  # Llama 2's and Mistral's, Gemma's

    def __init__(self, tokenizer, files: tuple[Path, ...] = ()):
        self.files = files
        kind = type(tokenizer).__name__
        if getattr(tokenizer, "max_seq_len", None) is not None:
            raise UserError(
                f"tokenizer.max_seq_len={tokenizer.max_seq_len} makes {kind} cut conversations silently. "
                "Set it to null: max_length and max_prompt_length limit pairs, and what they drop is counted."
            )
        special = getattr(tokenizer, "special_tokens", None) or {}
        self.style = f"torchtune's {kind}"
        self.bos_id, self.eos_id, self.pad_id = tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id
        # Qwen2's counts nothing, Phi3's not its special tokens, and what is counted may have gaps
        self.vocab_size = max(getattr(tokenizer, "vocab_size", None) or 0, 1 + max(special.values(), default=0))
        self.end_ids = frozenset(
            [*tokenizer.stop_tokens, self.eos_id, *(special[name] for name in END_OF_TURN if name in special)]
        )
        self.end_texts = [name for name, i in special.items() if i in self.end_ids] or list(self._SENTENCEPIECE_ENDS)
        self._tokenizer = tokenizer
        model = getattr(getattr(tokenizer, "_spm_model", None), "spm_model", None)  # SentencePiece's
        self.unknown_id = model.unk_id() if model is not None else None
        names = sorted({*special, *END_OF_TURN, *self._SENTENCEPIECE_ENDS})
        self._special_text = re.compile("|".join(map(re.escape, names)))
        reserved = {*special.values(), *self.end_ids, self.bos_id}
        self._recognised = [name for name in names if reserved.intersection(self.encode(name))]
        # Messages are encoded one by one, so what follows an answer does not depend on it.
        backwards = [ids[::-1] for ids in self._probe([{"role": "user", "content": "Hello"}])]
        self._tail = common_prefix(*backwards)[::-1]
        self._end = _end_once(self._tail, 0, self)
        self.stop_ids = _distinct([*tokenizer.stop_tokens, self.eos_id, self._end[-1]])

    def encode(self, text: str) -> list[int]:
        """Returns the text's tokens; none is added."""
        return self._tokenizer.encode(text, add_bos=False, add_eos=False)

    def special_texts_in(self, text: str) -> list[str]:
        """Returns none: what is written before a text is not known here as text."""
        return []

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        """Returns the tokens' text; SentencePiece tokenizers never write special tokens."""
        flags = {"skip_special_tokens": skip_special_tokens, "truncate_at_eos": False}
        known = signature(self._tokenizer.decode).parameters
        return self._tokenizer.decode(ids, **{name: value for name, value in flags.items() if name in known})

    def holds_special(self, text: str) -> bool:
        """Says whether a special token is written in the text."""
        return self._special_text.search(text) is not None

    def rendered(self, messages: list[dict], **options) -> Rendered:
        """Returns what `render` does, and no text."""
        return Rendered(self.render(messages, **options), None)

    def render(
        self,
        messages: list[dict],
        *,
        add_generation_prompt: bool = False,
        tools: list | None = None,
        arguments: Mapping | None = None,
    ) -> list[int]:
        """Returns the tokens of a conversation; ends as HFTokenizer.render's do.

        Raises:
            Refusal: The template refuses the conversation, there is more than text (tools, thoughts, arguments), or
                torchtune's tokenizer, such as Qwen 2's, would make a special token of a message's text.
        """
        check_texts(messages, self.style, tools)
        messages = [{"role": message["role"], "content": joined(message["content"])} for message in messages]
        for name in self._recognised:
            if any(name in message["content"] for message in messages):
                reason = f"{self.style} would make a token of the text {name}"
                raise Refusal(f"{reason}. Use pairtune.tokenizer.hf_tokenizer with the model's folder.", reason)
        if add_generation_prompt:
            return common_prefix(*self._probe(messages))
        ids = self._ids(messages)
        if messages[-1]["role"] != "assistant":
            return ids
        answer_stop = len(ids) - len(self._tail)
        assert ids[answer_stop:] == self._tail
        return ids[:answer_stop] + self._end

    def render_text(self, prompt: str, answer: str | None = None) -> list[int]:
        """Returns the tokens of prompt + answer as one text, BOS first, eos after an answer."""
        ids = [token for token in [self.bos_id] if token is not None] + self.encode(prompt + (answer or ""))
        return ids if answer is None else [*ids, self.eos_id]

    def _probe(self, messages: list[dict]) -> list[list[int]]:
        """Returns the conversation with several answers: what they share is there before any answer."""
        return [self._ids([*messages, {"role": "assistant", "content": text}]) for text in self._PROBES]

    def _ids(self, messages: list[dict]) -> list[int]:
        from torchtune.data import Message  # takes seconds, and folders do not need it

        ours_to_theirs = {"tool": "ipython"}
        try:
            conversation = [Message(ours_to_theirs.get(m["role"], m["role"]), m["content"]) for m in messages]
            return self._tokenizer.tokenize_messages(conversation)[0]
        except Exception as error:  # its templates raise what Python raises: KeyError, UnboundLocalError, ...
            roles = ", ".join(message["role"] for message in messages)
            message = f"{self.style} refuses the conversation ({roles}): {error!r}. Remove it."
            raise Refusal(message, repr(error)) from error


def hf_tokenizer(
    path: str,
    chat_template: str | None = None,
    special_tokens_in_text: str = "text",
    date: str | None = None,
    template_arguments: dict | None = None,
) -> HFTokenizer:
    """Returns the tokenizer of a Hugging Face model folder: of tokenizer.json, or of vocab.json and merges.txt.

    Args:
        chat_template: None for the folder's own, or plain text where it has none; "plain" for plain text;
            a path to a .jinja file; or the template's text.
        special_tokens_in_text: What a special token that is written in a message, such as `</s>`, becomes. "text":
            ordinary characters. "control": the token, as in transformers and for texts that are rendered already.
        date: YYYY-MM-DD, today for a template that asks (strftime_now). None: nothing tells it the day; Llama 3.2's
            then writes its own, 26 Jul 2024, and one that has none is refused when it is used.
        template_arguments: What the chat template is given besides, such as {"enable_thinking": False}. A row's own
            chat_template_kwargs come before these.

    Raises:
        UserError: The folder or a file is missing or broken, no eos is named, or an argument is none of these.
    """
    if special_tokens_in_text not in POLICIES:
        raise UserError(f"tokenizer.special_tokens_in_text={special_tokens_in_text!r}: must be text or control.")
    folder = Path(path).expanduser()
    config = read_object(folder / "tokenizer_config.json")
    backend = read_backend(folder, config)
    special = special_tokens(folder, config)
    stop_ids = model_stop_ids(folder)
    if "eos_token" not in special and stop_ids:
        special["eos_token"] = backend.id_to_token(stop_ids[0]) or f"token {stop_ids[0]}"
    if backend.token_to_id(special.get("eos_token", "")) is None:
        raise UserError(
            f"{folder}: eos_token is {special.get('eos_token', 'not set')!r}, which is no token of tokenizer.json. "
            "Set eos_token in tokenizer_config.json."
        )
    template, style = choose_template(folder, config, chat_template)
    try:
        return HFTokenizer(
            backend,
            special,
            stop_ids=stop_ids,
            add_bos=_adds_bos(backend, special),
            template=template,
            style=style,
            special_tokens_in_text=special_tokens_in_text,
            date=None if date is None else _date(date, template),
            arguments=_arguments(template_arguments, template),
            folder=folder,
        )
    except UserError as error:
        raise UserError(f"tokenizer.path={path}: {error}") from error


def adapt(tokenizer, component: Mapping | None = None) -> HFTokenizer | TorchtuneTokenizer:
    """Returns a tokenizer with the interface above: an HFTokenizer as it is, one of torchtune's wrapped.

    Args:
        component: The config's `tokenizer` block; the files that it names are the wrapped one's `files`.

    Raises:
        UserError: It is neither, or it has a max_seq_len.
    """
    if isinstance(tokenizer, HFTokenizer | TorchtuneTokenizer):
        return tokenizer
    if hasattr(tokenizer, "tokenize_messages"):
        named = [Path(value) for value in (component or {}).values() if isinstance(value, str)]
        return TorchtuneTokenizer(tokenizer, tuple(file for file in named if file.is_file()))
    raise UserError(
        f"tokenizer: {type(tokenizer).__name__} cannot write conversations. Use "
        "pairtune.tokenizer.hf_tokenizer with a model folder, or a torchtune tokenizer that has tokenize_messages."
    )


def trained_template(tokenizer: HFTokenizer | TorchtuneTokenizer, folder: Path) -> str | None:
    """Returns the chat template that writes conversations as the tokenizer does, None where there is none.

    Args:
        folder: The model's. Its template is that of one of torchtune's tokenizers if both write the same tokens.
    """
    if isinstance(tokenizer, HFTokenizer):
        return tokenizer.chat_template
    first = {"role": "user", "content": "Hello"}
    longer = [first, {"role": "assistant", "content": "Yes"}, {"role": "user", "content": "Why?"}]
    try:
        own = hf_tokenizer(str(folder))
        ours, theirs = (
            [which.render(messages, add_generation_prompt=True) for messages in ([first], longer)]
            for which in (tokenizer, own)
        )
    except UserError:
        return None
    return own.chat_template if ours == theirs else None


def check_vocabulary(tokenizer: HFTokenizer | TorchtuneTokenizer, folder: Path) -> None:
    """Refuses a model folder whose tokenizer gives other ids than this one, as far as both are tokenizer.json.

    Special tokens are not compared: a model's later versions rename those that they keep in reserve.

    Raises:
        UserError: A token is not there, or has another id.
    """
    if not isinstance(tokenizer, HFTokenizer) or not (folder / "tokenizer.json").is_file():
        return
    backend = read_backend(folder, read_object(folder / "tokenizer_config.json"))
    ours, theirs = (b.get_vocab(with_added_tokens=False) for b in (tokenizer._backend, backend))
    different = sorted((i, token) for token, i in ours.items() if theirs.get(token) != i)
    if different:
        i, token = different[0]
        raise UserError(
            f"{folder}: its tokenizer gives {len(different):,} of {len(ours):,} tokens another id, such as {token!r}, "
            f"which is {i} in `tokenizer` and {theirs.get(token, 'none')} there: its log-probabilities would be of "
            "other text; take a model with the same vocabulary"
        )


def common_prefix(*sequences: list[int]) -> list[int]:
    """Returns the longest list that all sequences begin with."""
    low, high = min(sequences), max(sequences)  # in dictionary order, so all others share what these two share
    alike, apart = 0, len(low) + 1
    while apart - alike > 1:  # parts of lists are compared without a look at each token
        middle = (alike + apart) // 2
        if low[alike:middle] == high[alike:middle]:
            alike = middle
        else:
            apart = middle
    return low[:alike]


def _end_once(ids: list[int], start: int, tokenizer) -> list[int]:
    """Cuts behind the first end token from position `start` on, or appends eos where there is none."""
    first = next((i for i in range(start, len(ids)) if ids[i] in tokenizer.end_ids), None)
    return [*ids, tokenizer.eos_id] if first is None else ids[: first + 1]


def _distinct(ids: list[int]) -> list[int]:
    return list(dict.fromkeys(ids))


def _unknown_id(backend: tokenizers.Tokenizer) -> int | None:
    """Returns the token that the model itself writes for what it has none for; not what a folder calls unk_token."""
    if isinstance(backend.model, tokenizers.models.Unigram):
        return json.loads(backend.to_str())["model"].get("unk_id")
    token = getattr(backend.model, "unk_token", None)
    return None if token is None else backend.token_to_id(token)


def _date(text: str, template: str | None) -> Date:
    if "strftime_now" not in (template or ""):
        raise UserError(f"date={text}: the chat template asks for no day (strftime_now); leave it out")
    try:
        return Date.fromisoformat(text)
    except ValueError:
        raise UserError(f"date={text}: must be a day as YYYY-MM-DD, such as 2025-01-31") from None


def _arguments(given: dict | None, template: str | None) -> dict:
    for name in given or {}:
        if not re.search(rf"\b{re.escape(str(name))}\b", template or ""):
            raise UserError(f"template_arguments.{name}: the chat template knows no such argument; leave it out")
    return dict(given or {})


def _adds_bos(backend: tokenizers.Tokenizer, special: dict[str, str]) -> bool:
    """Says whether plain text gets a BOS: whether tokenizer.json says so, not add_bos_token, as in transformers 5."""
    if "bos_token" not in special:
        return False
    encoding = backend.encode(special["bos_token"])  # one token; where bos == eos, the mask tells them apart
    return encoding.ids[0] == backend.token_to_id(special["bos_token"]) and encoding.special_tokens_mask[0] == 1
