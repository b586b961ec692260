"""`tune iterate`: rounds of DPO on a model's own answers (on-policy, arXiv 2312.16682, 2401.10020).

A round draws answers from the last round's model, has them judged, makes pairs of them, trains on these, and has the
trained model answer the held-out prompts. Each stage is a command of its own, which is printed; its file says that it
is done, and the same command again goes on with what is missing.
"""

import json
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pairtune.cli import judging
from pairtune.cli.ask import add_how, check_how
from pairtune.cli.children import Children
from pairtune.cli.prompts import read_prompts_file
from pairtune.cli.words import parser_of, prog
from pairtune.errors import UserError
from pairtune.files import read_object, telling, write_text
from pairtune.run import places, verdict
from pairtune.run.log_file import read_log

SETTINGS, ROUNDS = "iterate.json", "rounds.jsonl"
TRAINED, HELD_OUT = "prompts.jsonl", "held_out_prompts.jsonl"
SAFE_TO_DIFFER = ("rounds", "judge_budget", "judge_at_once", "judge_timeout", "batch_size")


@dataclass(frozen=True)
class Round:
    """A round's folder, and what it begins with; round 0 is the model as it was."""

    number: int
    folder: Path
    model: Path

    @property
    def run(self) -> Path:
        return self.folder / "run"

    @property
    def trained(self) -> Path:
        """The model that it makes."""
        return self.run / places.EXPORT if self.number else self.model


def iterate(argv: list[str]) -> int:
    """Train in rounds on the model's own answers: draw, judge, pair, train, and again from what was trained.

    The same command again goes on where it was stopped. Some of the prompts are held out: a table says how the judge
    likes each round's answers to them.
    """
    from pairtune.making.binarise import WAYS

    parser = parser_of(iterate)
    parser.add_argument("words", metavar="RECIPE", nargs="+", help="a recipe; then key=value of its config")
    parser.add_argument("--config", action="append", default=[], metavar="CONFIG", help="as for tune run")
    parser.add_argument("--prompts", type=Path, required=True, metavar="FILE", help="a prompt a line, or .jsonl")
    parser.add_argument("--output-dir", type=Path, required=True, metavar="FOLDER", help="which holds one a round")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="default: 3")
    parser.add_argument("--count", type=int, default=4, metavar="N", help="answers to each prompt; default: 4")
    parser.add_argument("--way", choices=list(WAYS), default="best-worst", help="of pairs; default: best-worst")
    parser.add_argument("--held-out", type=float, default=0.1, metavar="SHARE", help="of the prompts; default: 0.1")
    parser.add_argument("--reference", choices=("last", "first"), default="last", help="which round's; default: last")
    parser.add_argument("--batch-size", type=int, default=32, metavar="N", help="answers at a time; default: 32")
    add_how(parser, temperature=1.0, without=("adapter",))
    judging.add_options(parser)
    args = parser.parse_intermixed_args(argv)
    check_how(args)
    if args.judge is None:
        raise UserError("iterate: by whom are answers judged? --judge ADDRESS, FOLDER or my_file.function")
    if args.rounds < 1 or args.count < 2 or not args.temperature:
        raise UserError("iterate: takes --rounds 1 or more, --count 2 or more, and a --temperature above 0")
    if not 0 < args.held_out < 1:
        raise UserError(f"--held-out {args.held_out:g}: must be above 0 and below 1: rounds are judged by these")
    cfg, folder = _begin(args)
    with Children() as children:
        before, rows = Round(0, folder / "round_0", _base(cfg)), []
        try:
            for number in range(args.rounds + 1):
                this = Round(number, folder / f"round_{number}", before.trained)
                _round(this, Stages(args, folder, cfg, children))
                rows.append(_came_to(this))
                before = this
        except Stopped as stopped:
            again = shlex.join([prog(), "iterate", *argv])
            larger = " with a larger --judge-budget" if stopped.is_budget_used else ""
            print(f"\nstopped in round {len(rows)}; the same command{larger} goes on:\n  {again}")
            return 128 + children.heard if children.heard else judging.BUDGET_USED if stopped.is_budget_used else 1
    write_text(folder / ROUNDS, "".join(json.dumps(row) + "\n" for row in rows))
    print(f"\n{_table(rows)}\n\n{folder / ROUNDS}; the last round's model: {before.trained}")
    return 0


class Stopped(Exception):
    """A stage failed, a signal came, or the judge's budget is used."""

    def __init__(self, *, is_budget_used: bool):
        super().__init__()
        self.is_budget_used = is_budget_used


# A round


def _round(this: Round, stages: "Stages") -> None:
    """The loop: each line is a stage, and does nothing where its file is there."""
    this.folder.mkdir(exist_ok=True)
    if this.number:
        stages.say(f"round {this.number}")
        answers, scored, pairs = (this.folder / f"{name}.jsonl" for name in ("answers", "scored", "pairs"))
        stages.sample(this.model, TRAINED, answers, unless=scored, seed=this.number)
        stages.judge(answers, scored)
        stages.binarise(scored, pairs, seed=this.number)
        stages.train(this, pairs)
    answers, met, scored = (this.folder / f"held_out_{name}.jsonl" for name in ("answers", "met", "scored"))
    stages.sample(this.trained, HELD_OUT, answers, unless=scored, seed=0, count=1)
    if not scored.exists():
        _meet(stages.folder / "round_0" / "held_out_answers.jsonl", answers, met)
        stages.judge(met, scored)


def _meet(first: Path, other: Path, met: Path) -> None:
    """Writes both models' answers to each prompt beside each other, for a judge."""
    rows = [
        {**row, "answers": [row["answers"][0], now["answers"][0]]}
        for row, now in zip(_lines(first), _lines(other), strict=True)
    ]
    write_text(met, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


class Stages:
    """The commands of which a round is made."""

    def __init__(self, args, folder: Path, cfg: Mapping, children: Children):
        self.folder, self._args, self._children = folder, args, children
        self._base = _base(cfg)
        # Answers are drawn as they are trained on
        self._how = [f"device={cfg['device']}", f"dtype={cfg['dtype']}"]
        template = cfg["tokenizer"].get("chat_template")
        self._how += [f"tokenizer.chat_template={template}"] if template else []

    def say(self, text: str) -> None:
        print(f"\n===== {text} =====", flush=True)

    def sample(self, model: Path, prompts: str, answers: Path, *, unless: Path, seed: int, count: int = 0) -> None:
        """Answers prompts by a model."""
        asked = len(_lines(self.folder / prompts))
        if unless.exists() or (answers.exists() and answers.read_bytes().count(b"\n") == asked):
            return
        args = self._args
        words = ["--prompts", self.folder / prompts, "--output", answers, "--count", count or args.count]
        words += ["--seed", args.seed * 1000 + seed, "--batch-size", args.batch_size]
        words += ["--max-new-tokens", args.max_new_tokens, "--temperature", args.temperature]
        for option in ("top_k", "top_p", "system", "base_dtype"):
            value = getattr(args, option)
            words += [] if value is None else [f"--{option.replace('_', '-')}", value]
        self._run("data", "sample", model, *words, *self._how)

    def judge(self, answers: Path, scored: Path) -> None:
        """Has answers scored; an endpoint's replies in all rounds are in one file."""
        if scored.exists():
            return
        words = ["--judge", self._args.judge]
        for option in (*judging.OF_ENDPOINTS, "judge_reference"):
            if option != "verdicts" and getattr(self._args, option) is not None:
                words += [f"--{option.replace('_', '-')}", getattr(self._args, option)]
        is_endpoint = "://" in self._args.judge
        if is_endpoint:
            words += ["--verdicts", self._args.verdicts or self.folder / judging.VERDICTS]
        part = scored.with_suffix(".part")  # the end of a budget leaves some answers without a score, and is no end
        self._run("data", "judge", answers, "--output", part, *words, has_budget=is_endpoint)
        part.replace(scored)

    def binarise(self, scored: Path, pairs: Path, *, seed: int) -> None:
        """Makes pairs; a tenth of the questions show the run whether it learns."""
        if not pairs.exists():
            words = ["--way", self._args.way, "--held-out", 0.1, "--seed", self._args.seed * 1000 + seed]
            self._run("data", "binarise", scored, "--output", pairs, *words)

    def train(self, this: Round, pairs: Path) -> None:
        """Trains on the pairs, from the last round's weights."""
        if read_object(this.run / verdict.FILE).get("ended") in ("yes", "early") and this.trained.is_dir():
            return
        held_out = pairs.with_name("pairs.held_out.jsonl")
        words = [f"checkpointer.checkpoint_dir={this.model}", f"dataset.source={pairs}", f"output_dir={this.run}"]
        words += [f"eval_dataset.source={held_out if held_out.stat().st_size else 'null'}", "resume=auto"]
        if self._args.reference == "first" and this.number > 1:
            words += ["reference=model", f"reference.checkpoint_dir={self._base}"]
        configs = [word for path in self._args.config for word in ("--config", path)]
        self._run("run", self._args.words[0], *configs, *self._overrides, *words)

    @property
    def _overrides(self) -> list[str]:
        return self._args.words[1:]

    def _run(self, *words: Any, has_budget: bool = False) -> None:
        """Runs a command.

        Raises:
            Stopped: It failed, was stopped by a signal, or, where it has one, has used its budget.
        """
        words = list(map(str, words))
        print(f"\n$ {shlex.join([prog(), *words])}", flush=True)
        if status := self._children.run([sys.executable, "-u", "-P", "-m", "pairtune.cli", *words]):
            raise Stopped(is_budget_used=has_budget and status == judging.BUDGET_USED)


# Before the first round


def _base(cfg: Mapping) -> Path:
    """Returns the folder of the model that is begun with."""
    return Path(cfg["checkpointer"]["checkpoint_dir"]).expanduser()


def _begin(args) -> tuple[Mapping, Path]:
    """Returns the config, and the rounds' folder, with the prompts of either kind.

    Raises:
        UserError: Something is wrong with the config, or rounds in the folder were made with something else.
    """
    from pairtune import config
    from pairtune.cli.find import find
    from pairtune.cli.recipe import top_level
    from pairtune.making.held_out import is_held_out

    recipe = find("recipe", args.words[0])
    read = top_level(recipe, "METHOD", "DEFAULTS")
    for word in args.words[1:]:
        if word.startswith(("output_dir=", "dataset", "eval_dataset", "resume=")):
            raise UserError(f"{word}: rounds have pairs and run folders of their own; leave it out")
    words = [*args.words[1:], "dataset.source=pairs.jsonl", "eval_dataset=null"]  # as rounds have them
    configs = [find("config", name) for name in args.config]
    cfg = config.check(read["METHOD"], read["DEFAULTS"], configs, words)
    base, folder = _base(cfg), args.output_dir.expanduser()
    if not base.is_dir():
        raise UserError(f"checkpointer.checkpoint_dir={base}: there is no such folder; fetch it with `tune download`")
    rows = read_prompts_file(args.prompts)
    held_out = [is_held_out(row["prompt"], args.held_out, args.seed) for row in rows]
    kept = (
        [row for row, away in zip(rows, held_out, strict=True) if not away],
        [row for row, away in zip(rows, held_out, strict=True) if away],
    )
    if not all(kept):
        raise UserError(
            f"--prompts {args.prompts}: of {len(rows):,} prompts {len(kept[1]):,} are held out, and both kinds are "
            "needed; give more prompts, or another --held-out"
        )
    now = {name: str(value) for name, value in vars(args).items() if name not in SAFE_TO_DIFFER}
    with telling(folder, "name another --output-dir"):
        folder.mkdir(parents=True, exist_ok=True)
        before = read_object(folder / SETTINGS)
        name = next((name for name in now if before.get(name, str(None)) != now[name]), None)
        if before and name:
            raise UserError(
                f"{folder}: its rounds were made with {name} {before.get(name)}, not {now[name]}; name another "
                "--output-dir"
            )
        # First of all files: where a kill leaves a part of the others, or of this one, it is seen whose they are
        if not before and any(not path.name.startswith(f".{SETTINGS}.") for path in folder.iterdir()):
            raise UserError(f"{folder}: holds something else; name another --output-dir")
        write_text(folder / SETTINGS, json.dumps(now, indent=1) + "\n")
        for name, some in zip((TRAINED, HELD_OUT), kept, strict=True):
            write_text(folder / name, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in some))
    print(f"{folder}: {len(kept[0]):,} prompts to learn from, {len(kept[1]):,} held out")
    return cfg, folder


# What they came to


def _lines(path: Path) -> list[dict]:
    lines = path.read_text(encoding="utf-8").split("\n")  # a text may hold other line separators
    return [json.loads(line) for line in lines if line]


def _came_to(this: Round) -> dict:
    """Returns a round's line: what the judge says of its answers to the held-out prompts, and how its run ended."""
    from pairtune.run.evaluations import interval

    scored = [row["scores"] for row in _lines(this.folder / "held_out_scored.jsonl")]
    met = [(first, now) for first, now in scored if first is not None and now is not None]
    wins = sum((now > first) + (now == first) / 2 for first, now in met)
    row: dict[str, Any] = {"round": this.number, "prompts": len(scored), "judged": len(met)}
    if met:
        row |= {"score": sum(now for _, now in met) / len(met), "wins": wins / len(met)}
        row["interval"] = interval(row["wins"], len(met))
    if not this.number:
        return row
    held = [one for one in read_log(this.run / places.LOG) if "eval/loss" in one]
    last = held[-1] if held else {}
    said = read_object(this.run / verdict.FILE)
    names = {"held_out_loss": "eval/loss", "held_out_accuracy": "eval/rewards/accuracies", "kl": "eval/kl_per_token"}
    row |= {"pairs": len(_lines(this.folder / "pairs.jsonl")), "verdict": said.get("name")}
    return row | {name: last.get(key) for name, key in names.items()}


def _table(rows: list[dict]) -> str:
    """Returns the rounds as a table."""
    lines = ["round   pairs  verdict        KL a token   mean score   better than round 0"]
    for row in rows:
        low, high = row.get("interval", (0.0, 1.0))
        kl, score, wins = (row.get(name) for name in ("kl", "score", "wins"))
        shown = "" if wins is None or not row["round"] else f"{wins:.1%} ({low:.1%} to {high:.1%}) of {row['judged']:,}"
        lines.append(
            f"{row['round']:>5}  {row.get('pairs', ''):>6}  {row.get('verdict') or '':<13}  "
            f"{'' if kl is None else f'{kl:.3g}':>10}   {'' if score is None else f'{score:.4g}':>10}   {shown}"
        )
    return "\n".join(lines)
