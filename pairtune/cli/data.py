"""`tune data`: what is in a source of pairs, before anything is trained on it."""

import argparse
import importlib

from pairtune.cli.words import parser_of
from pairtune.errors import UserError, nearest

MAKING = {"sample": "sample", "contrast": "contrast", "judge": "judge", "binarise": "binarise", "binarize": "binarise"}


def data(argv: list[str]) -> int:
    """Look at pairs before training: duplicates, contradictions, length, languages, refusals, rows to read.

    `tune data FILE` is `tune data lint FILE`; keys of `dataset` may follow, as columns={prompt: question}. With
    --tokenizer, what becomes of the rows at a budget, too. --strict: status 1 if anything should be mended first.
    Other commands make pairs: `tune data sample`, `judge`, `binarise`, `contrast`, each with --help.
    """
    if argv[:1] and argv[0] in MAKING:
        module = importlib.import_module(f"pairtune.cli.making_{MAKING[argv[0]]}")
        return getattr(module, MAKING[argv[0]])(argv[1:])
    parser = parser_of(data)
    parser.add_argument("source", metavar="[lint] FILE", nargs="+", help="a file, a folder or a Hub id; key=value")
    parser.add_argument("--held-out", metavar="FILE", help="rows that are evaluated on: which of them training has")
    parser.add_argument("--tokenizer", metavar="FOLDER", help="a model's: counts tokens, and what is over the budget")
    parser.add_argument("--max-length", type=int, default=1024, metavar="N", help="the budget; default: %(default)s")
    parser.add_argument("--strict", action="store_true", help="status 1 if anything is wrong")
    args = parser.parse_intermixed_args(argv)
    sources = [word for word in args.source if "=" not in word]
    sources = sources[1:] if sources[:1] == ["lint"] and len(sources) > 1 else sources
    if len(sources) != 1:
        meant = nearest(sources[0], MAKING) if sources else ""
        raise UserError(f"data: which rows? tune data FILE [columns=...]; {len(sources)} are named{meant}")
    return _lint(sources[0], [word for word in args.source if "=" in word], args)


def _lint(source: str, words: list[str], args: argparse.Namespace) -> int:
    from pairtune.config.keys import ROWS
    from pairtune.pairs.lint import look
    from pairtune.pairs.rows import read_rows

    block = {**ROWS, **_settings(words, ROWS), "source": source}
    rows = rows_of(source, words)
    held_out = read_rows(args.held_out, columns=block["columns"], key="held-out") if args.held_out else None
    found = look(rows, "dataset", held_out=held_out, single=True)
    print(f"{source}\n{found}")
    if args.tokenizer:
        from pairtune.pairs.tokenize import read_pairs
        from pairtune.tokenizer.hf import hf_tokenizer

        _, report = read_pairs(block, hf_tokenizer(args.tokenizer), max_length=args.max_length, unpaired=True)
        print(f"\nat max_length={args.max_length}\n{report}")
    return int(args.strict and found.has_faults)


def rows_of(source: str, words: list[str]):
    """Returns a source's rows, read with key=value of `dataset`."""
    from pairtune.config.keys import ROWS
    from pairtune.pairs.rows import read_rows

    block = {**ROWS, **_settings(words, ROWS)}
    where = {name: block[name] for name in ("split", "name", "revision", "limit")}
    return read_rows(source, **where, columns=block["columns"])


def _settings(words: list[str], known: dict) -> dict:
    """Returns key=value of `dataset`'s keys, with or without its name before them."""
    from pairtune.config.reading import read_value

    found = {}
    for word in words:
        key, _, value = word.partition("=")
        name = key.removeprefix("dataset.")
        if name not in known:
            raise UserError(f"{key}: no key of dataset{nearest(name, known)}")
        found[name] = read_value(key, value, f"command line, {word}")
    return found
