"""`tune data sample`: several answers to each prompt."""

from pathlib import Path

from pairtune.cli.ask import add_how, check_how, one_folder, read_prompts_file, sampling_of
from pairtune.cli.words import parser_of
from pairtune.errors import UserError


def sample(argv: list[str]) -> int:
    """Draw several answers to each prompt from a model's folder, for `tune data judge` to say which are good.

    A file of answers that is there already is gone on with; it ends the same as if it had not been stopped.
    """
    parser = parser_of(sample, "data sample")
    parser.add_argument("words", metavar="FOLDER", nargs="+", help="a model's or a run's; then key=value of a config")
    parser.add_argument("--prompts", type=Path, required=True, metavar="FILE", help="a prompt a line, or .jsonl")
    parser.add_argument("--output", type=Path, required=True, metavar="JSONL", help="prompts and answers, as they come")
    parser.add_argument("--count", type=int, default=4, metavar="N", help="answers to each prompt; default: 4")
    parser.add_argument("--batch-size", type=int, default=32, metavar="N", help="answers at a time; default: 32")
    add_how(parser, temperature=1.0)
    args = parser.parse_intermixed_args(argv)
    check_how(args)
    folder, overrides = one_folder(args.words, "data sample")
    if args.count > 1 and not args.temperature:
        raise UserError(f"--count {args.count}: with --temperature 0 all answers to a prompt are one; give another")
    from pairtune.cli import asking  # and torch
    from pairtune.making.sample import sample as draw

    rows = read_prompts_file(args.prompts, asking.read_rows)
    if not rows:
        raise UserError(f"--prompts {args.prompts}: holds none")
    answer, drawing = drawn_from(folder, overrides, args, args.count)
    print(f"{args.output}: {draw(answer, rows, args.output, drawing)}")
    return 0


def drawn_from(folder: Path, overrides: list[str], args, count: int):
    """Returns what making/sample.py takes: a function that answers prompts by a model, and how it draws."""
    from pairtune.cli import asking  # and torch
    from pairtune.making.sample import Drawing

    model = asking.Model(asking.Asked(folder, args.adapter, args.base_dtype, overrides))

    def answer(prompts: list, seed: int) -> list[str]:
        texts = [""] * len(prompts)
        tokens = [model.prompt(one, args.system) for one in prompts]
        how = {"max_new_tokens": args.max_new_tokens, "sampling": sampling_of(args), "rng": model.generator(seed)}
        for added in model.answers(tokens, **how):
            texts = [text + more for text, more in zip(texts, added, strict=True)]
        return texts

    named = str(folder) + (f" with {args.adapter}" if args.adapter else "")
    how = {name: getattr(args, name) for name in ("seed", "batch_size", "max_new_tokens", "temperature")}
    how |= {name: getattr(args, name) for name in ("top_k", "top_p", "system")}
    return answer, Drawing(named, count, **how)
