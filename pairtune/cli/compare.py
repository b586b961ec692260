"""`tune compare`: models' answers to the same prompts, side by side; and runs, by what they were told and came to."""

import json
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

from pairtune.errors import UserError
from pairtune.files import telling, write_text
from pairtune.process import console
from pairtune.run import places
from pairtune.run.evaluations import held_of
from pairtune.run.finished import Finished, open_run

SHOWN = 20  # prompts, on the screen
FROM_A_RUN = 10  # of its held-out prompts, where none are given


def ask_all(folders: Sequence[Path], asked: Sequence, args, overrides: Sequence[str]) -> dict[str, list[str]]:
    """Returns each model's answers by its name: one model at a time is in memory.

    With `--urial` the first model answers a second time, with examples before the question in the place of a template.
    """
    from pairtune.cli import asking, urial
    from pairtune.models.generation import Sampling

    how = {"max_new_tokens": args.max_new_tokens, "sampling": Sampling(args.temperature, args.top_k, args.top_p)}
    found: dict[str, list[str]] = {}
    ways = [(str(folder), folder, False) for folder in folders]
    ways[1:1] = [(f"{folders[0]}, URIAL", folders[0], True)] if args.urial else []
    for name, folder, with_examples in ways:
        words = [*overrides, "tokenizer.chat_template=plain"] if with_examples else overrides
        model = asking.Model(asking.Asked(folder, None, args.base_dtype, words))
        texts = [urial.prompt(_question(one)) for one in asked] if with_examples else asked
        prompts = [model.prompt(one) for one in texts]
        model.check_room(prompts)
        answers: list[str] = []
        rng = model.generator(args.seed)
        starts = range(0, len(prompts), args.batch_size)
        for start in console.progress(starts, f"answers of {name}", shown=len(starts) > 1):
            batch = prompts[start : start + args.batch_size]
            parts = [""] * len(batch)
            for added in model.answers(batch, **how, rng=rng):
                parts = [text + more for text, more in zip(parts, added, strict=True)]
            answers += parts
        found[name] = [urial.cut(answer) for answer in answers] if with_examples else answers
    return found


def write_answers(path: Path, rows: Sequence[Mapping], answers: Mapping[str, Sequence[str]]) -> None:
    """Writes an object a prompt: `prompt`, each model's answer by its name, and what else the prompt's row has, `row`.

    Raises:
        UserError: It cannot be written.
    """
    lines = []
    for n, row in enumerate(rows):
        more = {"row": row} if row.keys() - {"prompt"} else {}
        line = {"prompt": row["prompt"], **more, **{name: found[n] for name, found in answers.items()}}
        lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    with telling(path, "name another file: --output"):
        write_text(path.expanduser(), "".join(lines))


def read_answers(path: Path) -> tuple[list[dict], dict[str, list[str]]]:
    """Returns rows and answers that `write_answers` wrote.

    Raises:
        UserError: It is no such file.
    """
    try:
        lines = [json.loads(line) for line in path.expanduser().read_text(encoding="utf-8").split("\n") if line.strip()]
        rows = [{**line.pop("row", {}), "prompt": line.pop("prompt")} for line in lines]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        told = getattr(error, "strerror", None) or "is not what --output of `tune compare` writes"
        raise UserError(f"--answers {path}: {told}; an object a line, its prompt and each model's answer") from None
    names = list(lines[0]) if lines else []
    are_answers = all(list(line) == names and all(isinstance(v, str) for v in line.values()) for line in lines)
    if len(names) < 2 or not are_answers:
        raise UserError(f"--answers {path}: must have, in each line, answers (texts) of the same two models or more")
    return rows, {name: [line[name] for line in lines] for name in names}


def _question(asked) -> str:
    """Returns the last thing that a user says."""
    if isinstance(asked, str):
        return asked
    return str(next((m.get("content") for m in reversed(asked) if m["role"] == "user"), ""))


def side_by_side(asked: Sequence, answers: dict[str, list[str]]) -> str:
    """Returns prompts with all answers, then a line a model: how many differ from the first one's, and lengths."""
    lines = []
    for n, one in enumerate(asked[:SHOWN]):
        lines += ["", f"> {_question(one).strip()}"]
        for name, found in answers.items():
            lines += [f"  {name}:", textwrap.indent(found[n].strip() or "(nothing)", "    ")]
    first, base = next(iter(answers.items()))
    if len(asked) > SHOWN:
        lines += ["", f"and {len(asked) - SHOWN:,} more prompts; --output FILE has all"]
    lines.append("")
    for name, found in answers.items():
        words = sorted(len(answer.split()) for answer in found)
        told = f"{len({*found}):,} distinct of {len(found):,}, a median of {words[len(words) // 2]:,} words"
        if name != first:
            changed = sum(one != other for one, other in zip(base, found, strict=True))
            told = f"{changed:,} of {len(found):,} answers changed against {first}; {told}"
        lines.append(f"{name}: {told}")
    return "\n".join(lines)


def prompts_of(run_dir: Path) -> list[str]:
    """Returns held-out prompts of a run, from where its config says that they are.

    Raises:
        UserError: They cannot be read, or there are none.
    """
    from pairtune.run.pair_texts import read_texts  # and torch

    texts = read_texts(open_run(run_dir).config, held_out=True)
    return list(dict.fromkeys(of_row[0][0] for of_row in texts.values() if of_row))[:FROM_A_RUN]


def show_runs(runs: Sequence[Finished]) -> None:
    """Prints what runs were told differently and came to, and draws their curves over each other.

    Raises:
        UserError: The picture cannot be written.
    """
    from pairtune.run import curves

    print(differences(runs))
    target = Path("curves.png")
    with telling(target, "go to another folder"):
        curves.save(curves.draw_runs({str(run.folder): run.log for run in runs}), target)
    print(target)


def runs_of(folders: Sequence[Path]) -> list[Finished]:
    """Returns those of the folders that are runs'."""
    return [open_run(folder) for folder in folders if (folder.expanduser() / places.LOG).is_file()]


def differences(runs: Sequence[Finished]) -> str:
    """Returns what runs were told differently, and what each came to, in tables."""
    flat = [_flat(run.config) for run in runs]
    keys = dict.fromkeys(key for one in flat for key in one)
    rows = [[key, *(one.get(key, "") for one in flat)] for key in keys if len({one.get(key) for one in flat}) > 1]
    rows = [row for row in rows if row[0] != "output_dir"]
    results = [["", *(run.name for run in runs)], *(rows or [["config", *["the same"] * len(runs)]])]
    held = [[row for row in run.log if "eval/loss" in row] for run in runs]
    results.append(["held-out loss", *(f"{one[-1]['eval/loss']:.4g}" if one else "" for one in held)])
    results.append(["ranked rightly", *(_ranked(one[-1]) if one else "" for one in held)])
    results.append(["verdict", *(run.verdict.name for run in runs)])
    widths = [max(len(row[n]) for row in results) for n in range(len(results[0]))]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in results)
    return "\n".join(line.rstrip() for line in lines)


def _ranked(row: dict) -> str:
    one = held_of(row)
    if one.accuracy is None or not one.is_ranking:
        return "-"
    low, high = one.interval
    return f"{one.accuracy:.1%} ({low:.1%} to {high:.1%})"


def _flat(node, prefix: str = "") -> dict[str, str]:
    if isinstance(node, dict) and node:
        return {k: v for key, value in node.items() for k, v in _flat(value, f"{prefix}{key}.").items()}
    return {prefix.removesuffix("."): json.dumps(node, ensure_ascii=False) if not isinstance(node, str) else node}
