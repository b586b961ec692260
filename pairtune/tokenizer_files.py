"""What the files of a Hugging Face model folder say of its tokenizer, read as transformers 5 reads them."""

import json
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, normalizers, pre_tokenizers

from pairtune.errors import UserError

SPECIAL_KEYS = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token")
CLASSES = {"gpt2": "GPT2Tokenizer", "qwen2": "Qwen2Tokenizer", "qwen3": "Qwen2Tokenizer"}  # by model_type
END_OF_TEXT = "<|endoftext|>"  # the eos of these classes where a folder names none
QWEN_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def read_backend(folder: Path, config: dict) -> tokenizers.Tokenizer:
    """Returns the tokenizer of tokenizer.json, or of vocab.json and merges.txt.

    Args:
        config: The folder's tokenizer_config.json.

    Raises:
        UserError: There are no such files, they are broken, or the words of vocab.json are cut in an unknown way.
    """
    if (folder / "tokenizer.json").is_file():
        return _tokenizer_json(folder, config)
    return _vocabulary_and_merges(folder, config)


def special_tokens(folder: Path, config: dict) -> dict[str, str]:
    """Returns {"bos_token": "<s>", ...}; as in transformers, an old folder's special_tokens_map.json comes first."""
    table = read_json(folder / "special_tokens_map.json")
    merged = {**table, **config} if "added_tokens_decoder" in config else {**config, **table}
    if not (folder / "tokenizer.json").is_file():
        merged.setdefault("eos_token", END_OF_TEXT)
    values = {key: merged.get(key) for key in SPECIAL_KEYS}
    texts = {key: value.get("content", value) if isinstance(value, dict) else value for key, value in values.items()}
    return {key: text for key, text in texts.items() if text is not None}


def model_stop_ids(folder: Path) -> list[int]:
    """Returns eos_token_id of generation_config.json, else of config.json: a number or a list there."""
    for file in ("generation_config.json", "config.json"):
        ids = read_json(folder / file).get("eos_token_id")
        if ids is not None:
            ids = ids if isinstance(ids, list) else [ids]
            if not all(type(i) is int and 0 <= i < 2**32 for i in ids):
                raise UserError(f"{folder / file}: eos_token_id={ids}: must be a token's number, or a list of them.")
            return ids
    return []


def read_json(file: Path) -> dict:
    """Returns what a JSON file of a model folder holds, {} where there is none.

    Raises:
        UserError: It cannot be read, or does not hold keys and values.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except (ValueError, RecursionError, OSError) as error:
        raise UserError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{file} must hold keys and values, holds a {type(content).__name__}.")
    return content


def _tokenizer_json(folder: Path, config: dict) -> tokenizers.Tokenizer:
    file = folder / "tokenizer.json"
    try:
        backend = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises bare Exception
        raise UserError(f"{file} cannot be read: {error}") from error
    backend.no_truncation()  # many folders store the truncation of their last use
    backend.no_padding()
    kind = str(config.get("tokenizer_class")).removesuffix("Fast")
    is_llama = read_json(folder / "config.json").get("model_type", "llama") == "llama"
    if is_llama and isinstance(backend.model, tokenizers.models.BPE):
        # Of these two, transformers 5 takes vocabulary and merges alone, whatever the file says of words and spaces.
        is_byte_level = "ByteLevel" in f"{backend.pre_tokenizer}{backend.decoder}"
        if kind == "GPT2Tokenizer" or (kind == "LlamaTokenizer" and not is_byte_level):
            _cut_words(backend, kind, config)
    return backend


def _vocabulary_and_merges(folder: Path, config: dict) -> tokenizers.Tokenizer:
    """Returns what transformers makes of a folder that has vocab.json and merges.txt alone."""
    files = [folder / name for name in ("vocab.json", "merges.txt")]
    if not all(file.is_file() for file in files):
        what = "has no tokenizer.json" if folder.is_dir() else "does not exist; `tune download` fetches a model"
        raise UserError(
            f"tokenizer.path: the folder {folder} {what}, nor vocab.json with merges.txt. A SentencePiece or tiktoken "
            "file alone is read by torchtune's tokenizers, such as torchtune.models.llama2.llama2_tokenizer."
        )
    kind = _class_without_tokenizer_json(folder, config)
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
    return backend


def _class_without_tokenizer_json(folder: Path, config: dict) -> str:
    kind = config.get("tokenizer_class") or CLASSES.get(read_json(folder / "config.json").get("model_type"))
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
    """Adds what a folder without tokenizer.json names elsewhere, in the order of the ids."""
    named = {END_OF_TEXT, *special_tokens(folder, config).values()}
    try:
        if "added_tokens_decoder" in config:
            added = {int(i): AddedToken(**token) for i, token in config["added_tokens_decoder"].items()}
        else:
            ids = read_json(folder / "added_tokens.json")
            added = {int(i): AddedToken(text, special=text in named) for text, i in ids.items()}
    except (AttributeError, TypeError, ValueError) as error:
        raise UserError(f"{folder}: the added tokens cannot be read: {error}") from error
    for i, token in sorted(added.items()):
        backend.add_tokens([token])
        if backend.token_to_id(token.content) != i:
            raise UserError(
                f"{folder}: {token.content} is token {i} in tokenizer_config.json or added_tokens.json, and would be "
                f"token {backend.token_to_id(token.content)} behind vocab.json's. Add the model's tokenizer.json."
            )
    named -= {token.content for token in added.values()}
    backend.add_special_tokens([AddedToken(text, special=True) for text in sorted(named)])
