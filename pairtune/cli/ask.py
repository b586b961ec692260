"""`tune generate` and `tune chat`: a model's answers, in the terminal or in a file."""

import argparse
import io
import json
import re
import sys
from pathlib import Path

from pairtune.cli import judging
from pairtune.cli.prompts import read_prompts_file
from pairtune.cli.words import parser_of
from pairtune.errors import UserError
from pairtune.files import telling, write_text
from pairtune.process import console


def generate(argv: list[str]) -> int:
    """Answer prompts with a model's folder (an export, one of the Hub's, a run's, an adapter's)."""
    parser = parser_of(generate)
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="a model's; of a run's, its export is taken")
    parser.add_argument(
        "overrides",
        metavar="key=value",
        nargs="*",
        help="of a config: dtype=fp32, compile=true, tokenizer.chat_template=plain, ...",
    )
    parser.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="may be given again")
    parser.add_argument("--prompts", type=Path, metavar="FILE", help="a prompt a line, or .jsonl; -: standard input")
    parser.add_argument("--output", type=Path, metavar="JSONL", help="prompts and answers, an object a line")
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="prompts at a time; default: 8")
    add_how(parser)
    args = parser.parse_intermixed_args(argv)
    check_how(args)
    check_overrides(args, args.overrides)
    from pairtune.cli import asking  # and torch

    asked = args.prompt + [row["prompt"] for row in read_prompts_file(args.prompts)]
    if not asked:
        raise UserError("what is asked? --prompt TEXT, --prompts FILE, or a prompt a line on standard input")
    model = asking.Model(asking.Asked(args.folder, args.adapter, args.base_dtype, args.overrides))
    prompts = [model.prompt(one, args.system) for one in asked]
    model.check_room(prompts)
    how = {"max_new_tokens": args.max_new_tokens, "sampling": sampling_of(args), "rng": model.generator(args.seed)}
    answers: list[str] = []
    starts = range(0, len(prompts), args.batch_size)
    for start in console.progress(starts, "answers", shown=args.output is not None and len(starts) > 1):
        batch = prompts[start : start + args.batch_size]
        texts = [""] * len(batch)
        streams = args.output is None and len(batch) == 1
        if streams:
            _print_asked(asked[start], alone=len(asked) == 1)
        for added in model.answers(batch, **how):
            texts = [text + more for text, more in zip(texts, added, strict=True)]
            if streams:
                print(added[0], end="", flush=True)
        answers += texts
        if streams:
            print()
        for one, text in zip(asked[start:], texts, strict=False) if args.output is None and not streams else ():
            _print_asked(one)
            print(text)
    if args.output:
        rows = [{"prompt": one, "answer": text} for one, text in zip(asked, answers, strict=True)]
        with telling(args.output, "name another file: --output"):
            write_text(args.output.expanduser(), "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows))
        print(f"{args.output}: {len(rows):,} answers")
    return 0


def chat(argv: list[str]) -> int:
    """Talk with a model's folder in the terminal, or with two of them side by side.

    An empty line is none, /new begins anew, /end or Ctrl-D ends; Ctrl-C ends an answer, and a second one the command.
    """
    parser = parser_of(chat)
    parser.add_argument("words", metavar="FOLDER", nargs="+", help="a model's; one or two; then key=value of a config")
    add_how(parser, temperature=0.7)
    args = parser.parse_intermixed_args(argv)
    check_how(args)
    folders, overrides = folders_of(args.words)
    check_overrides(args, overrides)
    if not 0 < len(folders) < 3:
        raise UserError(f"chat: {len(folders)} folders; one or two can be asked at a time")
    from pairtune.cli import asking  # and torch

    opened = [asking.Model(asking.Asked(folder, args.adapter, args.base_dtype, overrides)) for folder in folders]
    histories: list[list[dict]] = [[] for _ in opened]
    rngs = [model.generator(args.seed) for model in opened]
    print("/new begins anew, /end ends", file=sys.stderr)
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # so that a line that is no text is told, and the next is read
    while (line := _line()) is not None:
        if line == "/end":
            break
        if any("\ud800" <= letter <= "\udfff" for letter in line):
            print("the line is no text in UTF-8; it is not asked", file=sys.stderr)
            continue
        if line == "/new":
            histories = [[] for _ in opened]
        elif re.fullmatch(r"/\w+", line):
            print(f"{line}: no such command; /new begins anew, /end ends", file=sys.stderr)
        elif line:
            for folder, model, history, rng in zip(folders, opened, histories, rngs, strict=True):
                if len(opened) > 1:
                    print(f"{folder}:")
                _answer(model, history, line, args, rng)
    return 0


def folders_of(words: list[str]) -> tuple[list[Path], list[str]]:
    """Returns the folders among a command's words, and the key=value."""
    overrides = [word for word in words if "=" in word and not Path(word).is_dir()]
    return [Path(word) for word in words if word not in overrides], overrides


def one_folder(words: list[str], command: str) -> tuple[Path, list[str]]:
    """Returns the one model's folder among a command's words, and the key=value.

    Raises:
        UserError: There is none, or there are several.
    """
    folders, overrides = folders_of(words)
    if len(folders) != 1:
        raise UserError(f"{command}: {len(folders)} folders; answers are drawn from one model")
    return folders[0], overrides


def _line() -> str | None:
    """Returns what the user says, None when there is no more; a Ctrl-C at the prompt ends the command."""
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return None


def _answer(model, history: list[dict], line: str, args, rng) -> None:
    """Prints an answer as it comes, and keeps both in the conversation; an answer that cannot be given is none."""
    said, text = [*history, {"role": "user", "content": line}], ""
    try:
        prompt = model.prompt(said, args.system)
        how = {"max_new_tokens": args.max_new_tokens, "sampling": sampling_of(args), "rng": rng}
        for (added,) in model.answers([prompt], **how):
            text += added
            print(added, end="", flush=True)
    except KeyboardInterrupt:
        print(" ...", end="")
    except UserError as error:
        print(f"{error}; {'/new begins anew' if history else 'ask something shorter'}", file=sys.stderr)
        return
    print("\n")
    history[:] = [*said, {"role": "assistant", "content": text}]


def add_how(parser: argparse.ArgumentParser, temperature: float = 0.0, without: tuple[str, ...] = ()) -> None:
    """Adds the options that say how an answer is made."""
    if "adapter" not in without:
        parser.add_argument("--adapter", type=Path, metavar="FOLDER", help="in PEFT's layout, laid on the model")
    parser.add_argument("--base-dtype", choices=("nf4", "int8", "fp8"), help="linear layers in 4 or 8 bits")
    if "system" not in without:
        parser.add_argument("--system", metavar="TEXT", help="a system message before every conversation")
    parser.add_argument("--max-new-tokens", type=int, default=512, metavar="N", help="default: 512")
    known = "the likeliest token always" if not temperature else "0 takes the likeliest token always"
    parser.add_argument(
        "--temperature", type=float, default=temperature, metavar="T", help=f"default: {temperature}; {known}"
    )
    parser.add_argument("--top-k", type=int, metavar="K", help="draw among the K likeliest tokens")
    parser.add_argument("--top-p", type=float, metavar="P", help="among the fewest whose probability adds up to P")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of what is drawn; default: 0")


def check_how(args) -> None:
    """Refuses what is no number of tokens, probability or temperature, before torch is imported."""
    rules = (
        ("max_new_tokens", lambda v: v >= 1, "at least 1"),
        ("batch_size", lambda v: v >= 1, "at least 1"),
        ("count", lambda v: v >= 1, "at least 1"),
        ("temperature", lambda v: v >= 0, "0 or more"),
        ("top_k", lambda v: v >= 1, "at least 1"),
        ("top_p", lambda v: 0 < v <= 1, "above 0, and 1 at most"),
    )
    for name, holds, says in rules:
        value = getattr(args, name, None)
        if value is not None and not holds(value):
            raise UserError(f"--{name.replace('_', '-')} {value}: must be {says}")
    if not args.temperature and (args.top_k or args.top_p):
        given = "--top-k" if args.top_k else "--top-p"
        raise UserError(f"{given}: has no effect with --temperature 0, which takes the likeliest token; give both")


def check_overrides(args, overrides: list[str]) -> None:
    """Refuses keys of a config that the command has an option for: as keys they are those of training.

    Raises:
        UserError: One is given.
    """
    for word in overrides:
        name, _, value = word.partition("=")
        if name in vars(args):
            raise UserError(f"{word}: is an option of this command: --{name.replace('_', '-')} {value}")
        if name == "batch_size":
            raise UserError(f"{word}: has no effect on answers; leave it out")


def sampling_of(args):
    """Returns how tokens are drawn, by the options of `add_how`."""
    from pairtune.models.generation import Sampling

    return Sampling(args.temperature, args.top_k, args.top_p)


def _print_asked(asked, *, alone: bool = False) -> None:
    if not alone:
        from pairtune.making.judge.question import in_words

        print(f"\n> {in_words(asked, between=chr(10))}")


def compare(argv: list[str]) -> int:
    """Lay models' answers to the same prompts side by side; runs, by config, held-out pairs and curves, too.

    The first folder is what the others are compared with. Without prompts, a run's held-out ones are asked. With
    --judge, how often each model's answers are better than the first one's, with intervals.
    """
    parser = parser_of(compare)
    parser.add_argument("words", metavar="FOLDER", nargs="*", help="a model's or a run's; then key=value of a config")
    parser.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="may be given again")
    parser.add_argument("--prompts", type=Path, metavar="FILE", help="a prompt a line, or .jsonl; -: standard input")
    parser.add_argument("--urial", action="store_true", help="the first model also with examples before the question")
    parser.add_argument("--runs-only", action="store_true", help="of runs, no answers: nothing is loaded")
    parser.add_argument("--answers", type=Path, metavar="JSONL", help="what --output wrote, in the place of folders")
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="prompts at a time; default: 8")
    parser.add_argument("--output", type=Path, metavar="JSONL", help="prompts and all answers, an object a line")
    add_how(parser, without=("adapter", "system"))
    judging.add_options(parser)
    args = parser.parse_intermixed_args(argv)
    check_how(args)
    folders, overrides = folders_of(args.words)
    check_overrides(args, overrides)
    if args.answers is None and not folders:
        raise UserError("compare: which models? folders of models or runs, or --answers FILE that --output wrote")
    if args.answers is not None and (args.words or args.prompt or args.prompts or args.urial or args.runs_only):
        raise UserError("--answers: has prompts and answers already; leave out folders, prompts, --urial, --runs-only")
    if twice := next((folder for n, folder in enumerate(folders) if folder in folders[:n]), None):
        raise UserError(f"compare: {twice} is named twice; its answers are the same")
    if args.judge and args.answers is None and len(folders) + args.urial < 2:
        raise UserError("--judge: compares models' answers, and one is named; name another folder, or --urial")
    with judging.judge_of(args) as judge:
        return _compare(folders, overrides, args, judge)


def _compare(folders: list[Path], overrides: list[str], args, judge) -> int:
    from pairtune.cli import compare as comparing

    if args.answers is not None:
        rows, answers = comparing.read_answers(args.answers)
    else:
        runs = comparing.runs_of(folders)
        if len(runs) > 1:
            comparing.show_runs(runs)
        if args.runs_only:
            return 0
        rows = [{"prompt": one} for one in args.prompt] + read_prompts_file(args.prompts)
        rows = rows or [{"prompt": one} for one in (comparing.prompts_of(runs[-1].folder) if runs else [])]
        if not rows:
            raise UserError("what is asked? --prompt TEXT, --prompts FILE, or a run, whose held-out prompts are taken")
        answers = comparing.ask_all(folders, [row["prompt"] for row in rows], args, overrides)
    print(comparing.side_by_side([row["prompt"] for row in rows], answers))
    if args.output:
        comparing.write_answers(args.output, rows, answers)
        print(f"{args.output}: {len(rows):,} prompts")
    if judge:
        print(judging.told(judge, rows, answers))
    return 0
