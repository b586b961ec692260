"""What the files of a Hugging Face model folder say of its tokenizer, read as transformers 5 reads them."""

from pathlib import Path

import tokenizers
from tokenizers import AddedToken, normalizers, pre_tokenizers, processors

from pairtune.errors import UserError
from pairtune.files import read_object

SPECIAL_KEYS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
CLASSES = {"gpt2": "GPT2Tokenizer", "qwen2": "Qwen2Tokenizer", "qwen3": "Qwen2Tokenizer"}  # by model_type
OF_THE_FILE = ("mistral", "mixtral", "phi3", "qwen2")  # model types whose tokenizer.json overrules tokenizer_class
END_OF_TEXT = "<|endoftext|>"
DEFAULTS = {  # which of a class's tokens are END_OF_TEXT where a folder does not name them
    "GPT2Tokenizer": ("bos_token", "eos_token", "unk_token"),
    "Qwen2Tokenizer": ("eos_token", "unk_token", "pad_token"),
}
QWEN_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def read_backend(folder: Path, config: dict) -> tokenizers.Tokenizer:
    """Returns the tokenizer of tokenizer.json, or of vocab.json and merges.txt, with the tokens that others add.

    Args:
        config: The folder's tokenizer_config.json.

    Raises:
        UserError: There are no such files, they are broken or contradict each other, or the words of vocab.json are
            cut in an unknown way.
    """
    if config.get("split_special_tokens"):
        raise UserError(
            f"{folder}: split_special_tokens in tokenizer_config.json makes ordinary characters of the chat template's "
            "special tokens; set it to false. Those in messages are such characters in any case."
        )
    find_files(folder)
    if (folder / "tokenizer.json").is_file():
        return _tokenizer_json(folder, config)
    return _vocabulary_and_merges(folder, config)


def find_files(folder: Path) -> None:
    """Refuses a folder that has no tokenizer.json, nor vocab.json and merges.txt.

    Raises:
        UserError: With what reads other files.
    """
    if (folder / "tokenizer.json").is_file() or all((folder / name).is_file() for name in ("vocab.json", "merges.txt")):
        return
    what = "has no tokenizer.json" if folder.is_dir() else "does not exist; `tune download` fetches a model"
    raise UserError(
        f"tokenizer.path: the folder {folder} {what}, nor vocab.json with merges.txt. A SentencePiece or tiktoken "
        "file alone is read by torchtune's tokenizers, such as torchtune.models.llama2.llama2_tokenizer."
    )


def special_tokens(folder: Path, config: dict) -> dict[str, str]:
    """Returns {"bos_token": "<s>", ...}, with what a folder names besides, such as "image_token"."""
    return {key: token.content for key, token in _special_tokens(folder, config)[0].items()}


def model_stop_ids(folder: Path) -> list[int]:
    """Returns eos_token_id of generation_config.json, else of config.json: a number or a list there."""
    for file in ("generation_config.json", "config.json"):
        ids = read_object(folder / file).get("eos_token_id")
        if ids is not None:
            ids = ids if isinstance(ids, list) else [ids]
            if not all(type(i) is int and 0 <= i < 2**32 for i in ids):
                raise UserError(f"{folder / file}: eos_token_id={ids}: must be a token's number, or a list of them.")
            return ids
    return []


def _tokenizer_json(folder: Path, config: dict) -> tokenizers.Tokenizer:
    file = folder / "tokenizer.json"
    try:
        backend = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises bare Exception
        raise UserError(f"{file} cannot be read: {error}") from error
    backend.no_truncation()  # many folders store the truncation of their last use
    backend.no_padding()
    _add_tokens(backend, folder, config)
    kind = _tokenizer_class(folder, config)
    by_class = read_object(folder / "config.json").get("model_type") not in OF_THE_FILE
    if by_class and isinstance(backend.model, tokenizers.models.BPE):
        # Of these two, transformers 5 takes vocabulary and merges alone, whatever the file says of words and spaces.
        is_byte_level = "ByteLevel" in f"{backend.pre_tokenizer}{backend.decoder}"
        if kind == "GPT2Tokenizer" or (kind == "LlamaTokenizer" and not is_byte_level):
            _cut_words(backend, kind, config)
    return backend


def _vocabulary_and_merges(folder: Path, config: dict) -> tokenizers.Tokenizer:
    """Returns what transformers makes of a folder that has vocab.json and merges.txt alone."""
    files = [folder / name for name in ("vocab.json", "merges.txt")]
    kind = _tokenizer_class(folder, config)
    if kind not in CLASSES.values():
        raise UserError(
            f"{folder}: without tokenizer.json, vocab.json and merges.txt are read as GPT2Tokenizer or Qwen2Tokenizer, "
            f"and tokenizer_class is {config.get('tokenizer_class')}. Set it in tokenizer_config.json."
        )
    try:
        backend = tokenizers.Tokenizer(tokenizers.models.BPE.from_file(*map(str, files)))
    except Exception as error:  # the library raises bare Exception
        raise UserError(f"{folder}: vocab.json and merges.txt cannot be read: {error}") from error
    _cut_words(backend, kind, config)
    backend.decoder = tokenizers.decoders.ByteLevel()
    _add_tokens(backend, folder, config)
    bos = special_tokens(folder, config).get("bos_token")
    if bos and config.get("add_bos_token"):
        ids = [(bos, backend.token_to_id(bos))]
        backend.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=ids)
    return backend


def _tokenizer_class(folder: Path, config: dict) -> str:
    kind = config.get("tokenizer_class") or CLASSES.get(read_object(folder / "config.json").get("model_type"))
    return str(kind).removesuffix("Fast")


def _cut_words(backend: tokenizers.Tokenizer, kind: str, config: dict) -> None:
    """Sets how a class of transformers 5 treats a text before its merges."""
    prefix = config.get("add_prefix_space")
    if kind == "LlamaTokenizer":
        scheme = "never" if prefix is False else "always" if config.get("legacy") else "first"
        backend.normalizer = None
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    elif kind == "GPT2Tokenizer":
        backend.normalizer = None
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=bool(prefix))
    else:
        words = pre_tokenizers.Split(tokenizers.Regex(QWEN_WORDS), "isolated")
        in_bytes = pre_tokenizers.ByteLevel(add_prefix_space=bool(prefix), use_regex=False)
        backend.normalizer = normalizers.NFC()
        backend.pre_tokenizer = pre_tokenizers.Sequence([words, in_bytes])


def _add_tokens(backend: tokenizers.Tokenizer, folder: Path, config: dict) -> None:
    """Adds, in transformers' order, the tokens that other files than tokenizer.json name or describe differently."""
    named, unnamed = _special_tokens(folder, config)
    there = backend.get_added_tokens_decoder()
    descriptions = set(map(repr, there.values()))
    declared = _declared_tokens(folder, config, {token.content for token in [*named.values(), *unnamed]})
    new = {i: token for i, token in sorted(declared.items()) if repr(token) not in descriptions}
    backend.add_tokens(list(new.values()))
    for i, token in new.items():
        if backend.token_to_id(token.content) != i:
            raise UserError(
                f"{folder}: {token.content} is token {i} in tokenizer_config.json or added_tokens.json, and would be "
                f"token {backend.token_to_id(token.content)} behind the vocabulary's. Take the tokenizer.json of the "
                "model itself."
            )
    for key in ("bos_token", "eos_token"):  # others may be new: nobody has trained them, and nothing writes them
        if key in named and backend.token_to_id(named[key].content) is None:
            raise UserError(
                f"{folder}: {key} is {named[key].content!r}, which is no token of tokenizer.json. Set {key} in "
                "tokenizer_config.json."
            )
    texts = {token.content for token in [*there.values(), *new.values()]}
    backend.add_tokens([token for token in [*named.values(), *unnamed] if token.content not in texts])


def _declared_tokens(folder: Path, config: dict, special: set[str]) -> dict[int, AddedToken]:
    """Returns what added_tokens_decoder of tokenizer_config.json holds, else an old folder's added_tokens.json."""
    try:
        if "added_tokens_decoder" in config:
            return {int(i): AddedToken(**token) for i, token in config["added_tokens_decoder"].items()}
        ids = read_object(folder / "added_tokens.json")
        return {int(i): AddedToken(text, special=text in special) for text, i in ids.items()}
    except (AttributeError, TypeError, ValueError) as error:
        raise UserError(f"{folder}: the added tokens cannot be read: {error}") from error


def _special_tokens(folder: Path, config: dict) -> tuple[dict[str, AddedToken], list[AddedToken]]:
    """Returns the special tokens that have a name, such as "bos_token", and those that have none.

    As in transformers, an old folder's special_tokens_map.json comes first.
    """
    table = {} if "added_tokens_decoder" in config else read_object(folder / "special_tokens_map.json")
    settings = {**config, **table}
    if not (folder / "tokenizer.json").is_file():
        defaults = DEFAULTS.get(_tokenizer_class(folder, config), ())
        settings = dict.fromkeys(defaults, END_OF_TEXT) | settings
    own = {key: value for key, value in settings.items() if key.endswith("_token") and isinstance(value, str | dict)}
    named = {key: settings.get(key) for key in SPECIAL_KEYS} | own
    unnamed = []
    for source in (config, table):
        more = source.get("extra_special_tokens") or (not unnamed and source.get("additional_special_tokens")) or []
        if isinstance(more, dict):
            named |= more
        else:
            unnamed += more if isinstance(more, list) else [more]
    named = {key: _added_token(value, key, folder, special=True) for key, value in named.items() if value}
    return named, [_added_token(value, "extra_special_tokens", folder) for value in unnamed]


def _added_token(value: str | dict, key: str, folder: Path, **flags) -> AddedToken:
    fields = value if isinstance(value, dict) else {"content": value, "special": True}
    try:
        token = AddedToken(**{name: field for name, field in fields.items() if name != "__type"} | flags)
    except TypeError:
        token = None
    if token is None or not token.content:
        raise UserError(f"{folder}: {key} is {value!r}, which is no token's text, nor an object with its content.")
    return token
