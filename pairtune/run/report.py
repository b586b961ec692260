"""report.html: a run in one file that needs no network: verdict, curves, answers before and after, pairs, config.

Plain HTML, with curves as SVG in the page's own colours, dark and light, from 400 pixels on. No script. No torch.
"""

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path

import yaml

from pairtune.config.saved import changes
from pairtune.process import console
from pairtune.run import pair_log, places
from pairtune.run.curves import PANELS, length_baseline, points, start_of
from pairtune.run.dynamics import courses
from pairtune.run.evaluations import held_of
from pairtune.run.finished import Finished

FILE = "report.html"
HARDEST, ANSWERS = 5, 10  # held-out pairs and answers that are shown
SHOWN = {  # of the evaluations before and after
    "eval/loss": "loss",
    "eval/rewards/accuracies": "ranked rightly",
    "eval/auc": "area under the curve",
    "eval/rewards/margins": "margin",
    "eval/logps/chosen": "log-probability of chosen, nats",
    "eval/logps/rejected": "of rejected",
    "eval/chosen_lost/nats_per_token": "chosen lost, nats a token",
    "eval/kl_per_token": "KL from the reference, nats a token",
    "eval/pairs": "pairs",
}
WIDTH, HEIGHT, LEFT, BOTTOM = 360, 200, 48, 22  # of a panel, and its margins
STYLE = """
:root { color-scheme: light dark; --back: #fff; --text: #1c1e21; --soft: #6b7280; --line: #d9dce1; --card: #f6f7f9;
  --a: #1f6fb2; --b: #d9730d; --c: #c0362c; }
@media (prefers-color-scheme: dark) { :root { --back: #14161a; --text: #e6e8eb; --soft: #9aa2ad; --line: #343941;
  --card: #1d2026; --a: #6cb2eb; --b: #f2a65a; --c: #ef7b72; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1240px; padding: 16px; background: var(--back); color: var(--text);
  font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
.verdict, figure, details, .pair { background: var(--card); border: 1px solid var(--line); border-radius: 8px;
  padding: 12px 16px; margin: 12px 0; }
.grid { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 340px), 1fr)); gap: 12px; }
.grid > * { margin: 0; min-width: 0; }
.two { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 300px), 1fr)); gap: 12px; }
figcaption, .soft, dt { color: var(--soft); font-size: .9rem; }
svg { width: 100%; height: auto; display: block; }
svg text { fill: var(--soft); font-size: 10px; } svg .axis { stroke: var(--line); stroke-width: 1; }
pre { white-space: pre-wrap; font-size: .85rem; margin: 0; } dd { margin: 0 0 .6rem; white-space: pre-wrap; }
.a { stroke: var(--a); } .b { stroke: var(--b); } .c { stroke: var(--c); }
polyline { fill: none; stroke-width: 1.6; } .training { stroke-width: 1; opacity: .55; }
.key span::before { content: "\\25AC "; } .ka::before { color: var(--a); } .kb::before { color: var(--b); }
.kc::before { color: var(--c); } table { border-collapse: collapse; align-self: start; justify-self: start; }
td { padding: 2px 16px 2px 0; vertical-align: top; } .numbers td + td { white-space: nowrap; }
.wide { overflow-x: auto; } .wide pre { white-space: pre; overflow-wrap: normal; }
.wide .pair { width: max-content; min-width: 100%; }
"""


def write(run: Finished, text_of: Callable[[int, int], Sequence[str] | None] = lambda *_: None) -> str:
    """Returns the page.

    Args:
        text_of: Gives prompt, chosen and rejected of a held-out pair, by its row and digest; where it gives None, a
            pair is shown by its number.
    """
    parts = [
        f"<h1>{escape(run.name)}</h1>",
        _verdict(run),
        "<h2>Curves</h2>",
        f'<div class="grid">{"".join(_panel(name, run.log) for name in PANELS)}</div>',
        _numbers(run.log),
        _pairs(run.folder / console.FILE),
        _hardest(run, text_of),
        _answers(run.folder / "samples.jsonl"),
        _config(run.folder / places.CONFIG),
    ]
    head = (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(run.name)}: {escape(run.verdict.name)}</title>\n<style>{STYLE}</style>\n</head>\n"
    )
    return f"{head}<body>\n{chr(10).join(part for part in parts if part)}\n</body>\n</html>\n"


def _verdict(run: Finished) -> str:
    state = ""
    if run.runs:
        state = (
            f"<p>Made after step {run.verdict.step}, while the run went on. It replaces this page at its next "
            "evaluation and at its end; of a run that was killed, <code>tune report RUN</code> makes it again.</p>"
        )
    elif run.was_killed:
        state = f"<p>The run was stopped after step {run.verdict.step}, by a kill or a crash: it did not end.</p>"
    elif run.verdict.ended in ("stopped", "failed"):
        state = f"<p>The run {run.verdict.ended} after step {run.verdict.step}: it did not end.</p>"
    lines = [f"<li>{escape(line)}</li>" for line in run.verdict.numbers]
    advice = [f"<li>{escape(line)}</li>" for line in run.verdict.advice]
    told = f"<p>What to change:</p><ul>{''.join(advice)}</ul>" if advice else ""
    says = f"<p><strong>{escape(run.verdict.name)}</strong>: {escape(run.verdict.says)}</p>"
    return f'<div class="verdict">{says}{state}<ul>{"".join(lines)}</ul>{told}</div>'


def _panel(name: str, log: Sequence[Mapping]) -> str:
    """Returns a figure of one of PANELS as SVG; "" where the run has none of it."""
    keys, start = PANELS[name]
    lines, used = [], []
    for key in keys:
        for prefix in ("", "eval/"):
            steps, values = points(log, prefix + key)
            kept = [(s, v) for s, v in zip(steps, values, strict=True) if math.isfinite(v)]
            kind = "c" if key.endswith("rejected") else "b" if prefix and len(keys) == 1 else "a"
            if kept:
                lines.append((kept, kind, not prefix))
                label = key.rpartition("/")[2] if len(keys) > 1 else "held out" if prefix else "training"
                used += [(kind, label)] if (kind, label) not in used else []
    if not lines:
        return ""
    start = start_of(log, "loss") if name == "loss" else start
    marks = [value for value in (start, length_baseline(log) if name == "accuracy" else None) if value is not None]
    values = [v for kept, _, _ in lines for _, v in kept] + marks
    low, high = (0.0, 1.0) if name == "accuracy" else (min(values), max(values))
    high = high if high > low else low + (abs(low) or 1.0)
    last = max(s for kept, _, _ in lines for s, _ in kept) or 1

    def at(step: float, value: float) -> str:
        x = LEFT + (WIDTH - LEFT - 8) * step / last
        return f"{x:.1f},{8 + (HEIGHT - BOTTOM - 8) * (high - value) / (high - low):.1f}"

    drawn = [f'<path class="axis" fill="none" d="M{at(0, high)} L{at(0, low)} L{at(last, low)}"/>']
    drawn += [f'<path class="axis" stroke-dasharray="4 3" d="M{at(0, v)} L{at(last, v)}"/>' for v in marks]
    for kept, kind, is_training in lines:
        way = " ".join(at(*point) for point in kept)
        drawn.append(f'<polyline class="{kind}{" training" if is_training else ""}" points="{way}"/>')
    for value, y in ((high, 14), (low, HEIGHT - BOTTOM)):
        drawn.append(f'<text x="{LEFT - 4}" y="{y}" text-anchor="end">{value:.3g}</text>')
    drawn.append(f'<text x="{WIDTH - 8}" y="{HEIGHT - 6}" text-anchor="end">step {last}</text>')
    key = " ".join(f'<span class="k{kind}">{escape(label)}</span>' for kind, label in used)
    box = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(name)}">{"".join(drawn)}</svg>'
    return f'<figure><figcaption>{escape(name)} <span class="key">{key}</span></figcaption>{box}</figure>'


def _numbers(log: Sequence[Mapping]) -> str:
    """Returns what held-out pairs came to before and after, and what a step took; all there is, folded."""
    held = [row for row in log if "eval/loss" in row]
    steps = [row for row in log if "pairs_per_second" in row]
    shown = ""
    if held:
        first, last = held[0], held[-1]
        names = [name for name in SHOWN if name in last]
        cells = [[SHOWN[name], *(_number(row, name) for row in (first, last))] for name in names]
        when = ["before training" if first["step"] == 0 else f"step {first['step']}", f"step {last['step']}"]
        shown += _table([["held-out pairs", *when], *cells])
    if steps:
        speeds = sorted(row["pairs_per_second"] for row in steps)
        took = [["steps", f"{steps[-1]['step']:,}"], ["pairs a second, median", f"{speeds[len(speeds) // 2]:.3g}"]]
        peak = max((row.get("peak_memory_gib") or 0.0 for row in steps), default=0.0)
        shown += _table([*took, ["memory at most, GiB", f"{peak:.3g}"]])
    rows = {**(steps or [{}])[-1], **(held or [{}])[-1]}
    everything = _table([[name, f"{value:.6g}"] for name, value in rows.items() if isinstance(value, (int, float))])
    folded = f"<details><summary>all numbers of the last step and evaluation</summary>{everything}</details>"
    return f'<h2>Numbers, memory, speed</h2><div class="two">{shown}</div>{folded}'


def _number(row: Mapping, name: str) -> str:
    if name == "eval/rewards/accuracies" and not held_of(row).is_ranking:
        return "all tied"
    return "" if row.get(name) is None else f"{row[name]:.4g}"


def _table(rows: Sequence[Sequence[str]], kind: str = "numbers") -> str:
    cells = ("".join(f"<td>{escape(cell)}</td>" for cell in row) for row in rows)
    return f'<table class="{kind}">{"".join(f"<tr>{row}</tr>" for row in cells)}</table>'


def _pairs(path: Path) -> str:
    """Returns the tables that account for every row, as the run's last start told them."""
    told = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    of_start = re.split(r"^# \d{4}-\d\d-\d\d .*\n", told, flags=re.MULTILINE)[-1]
    tables = [part for part in of_start.split("\n\n") if part.startswith(("Training pairs", "Held-out pairs"))]
    shown = "".join(f'<div class="pair"><pre>{escape(table.strip())}</pre></div>' for table in tables)
    return f'<h2>Pairs</h2><div class="wide">{shown}</div>' if shown else ""


def _hardest(run: Finished, text_of: Callable[[int, int], Sequence[str] | None]) -> str:
    found = courses(pair_log.read(run.folder / pair_log.FILE), held_out=True)
    if not found:
        return ""
    shown = []
    for course in sorted(found, key=lambda course: course.margins[-1])[:HARDEST]:
        terms = "".join(
            f"<dt>{name}</dt><dd>{escape(words.strip())}</dd>"
            for name, words in zip(
                ("prompt", "chosen", "rejected"), text_of(course.row, course.digest) or (), strict=False
            )
        )
        head = f'<p class="soft">row {course.row}: margin {course.margins[-1]:+.3f} at step {course.steps[-1]}</p>'
        shown.append(f'<div class="pair">{head}{f"<dl>{terms}</dl>" if terms else ""}</div>')
    return f"<h2>Held-out pairs that it finds hardest</h2>{''.join(shown)}"


def _answers(path: Path) -> str:
    if not path.exists():
        return ""
    with path.open(encoding="utf-8") as file:
        samples = [json.loads(line) for line in file]
    changed = [sample for sample in samples if sample.get("after") not in (None, sample.get("before"))]
    shown = []
    for sample in sorted(samples, key=lambda sample: sample not in changed)[:ANSWERS]:
        texts = {side: str(sample.get(side, "the run did not come to it")) for side in ("before", "after")}
        sides = [f'<div><p class="soft">{side}</p><pre>{escape(text)}</pre></div>' for side, text in texts.items()]
        head = f"<p>{escape(sample['prompt'].strip())}</p>"
        shown.append(f'<div class="pair">{head}<div class="two">{"".join(sides)}</div></div>')
    count = f"{len(changed):,} of {len(samples):,} answers changed; of these first"
    count = count if any("after" in sample for sample in samples) else "The run ended before its model was asked again"
    return f'<h2>Answers before and after</h2><p class="soft">{count}.</p>{"".join(shown)}' if shown else ""


def _config(path: Path) -> str:
    if not path.exists():
        return ""
    text = path.read_text(encoding="utf-8")
    command = text.splitlines()[0].lstrip("# ") if text.startswith("#") else ""
    again = f"<p>The command that repeats it:</p><pre>{escape(command)}</pre>" if command else ""
    try:
        found = changes(text)
    except yaml.YAMLError:  # a file of somebody else's making
        found = []
    other = _table([["what differs from the recipe", "here", "default"], *found], "words") if found else ""
    return f"<h2>Config</h2>{again}{other}<details><summary>config.yaml</summary><pre>{escape(text)}</pre></details>"
