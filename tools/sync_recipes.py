"""Keeps the six recipes one text: they differ only where they must.

    python tools/sync_recipes.py --check     # exits 1 and shows the lines that differ
    python tools/sync_recipes.py --write     # copies from lora_dpo_distributed.py

A recipe is cut at its comment headings: the groups of DEFAULTS and the numbered sections of main. Sections that are not
a method's own are the same, byte by byte, in all recipes; they are edited in lora_dpo_distributed.py. A single-device
recipe is its distributed twin without the lines that say "distributed only", under a docstring of its own.
"""

import argparse
import ast
import difflib
import re
import sys
from pathlib import Path

RECIPES = Path(__file__).parents[1] / "recipes"
METHODS = ("full", "lora", "qlora")
SOURCE = "lora_dpo_distributed"
# What a method has of its own; docstring, imports and METHOD stand before the first heading.
OWN = ("head", "# The model and how it is trained", "# 2. Policy and reference", "# 4. Weights", "# 9. Answers")
HEADING = re.compile(r"^    (# (?:\d+\. )?[A-Z][^.,:\n]*)", re.MULTILINE)
MARK = "distributed only"


def sections(text: str) -> list[tuple[str, str]]:
    """Returns (heading, text) pairs that make up the whole recipe; the first heading is "head"."""
    first = text.index("DEFAULTS = {")
    starts = [m.start() for m in HEADING.finditer(text, first) if is_heading(text, m)]
    parts = [("head", text[: starts[0]])]
    for start, end in zip(starts, [*starts[1:], len(text)], strict=True):
        parts.append((HEADING.match(text, start).group(1).strip(), text[start:end]))
    return parts


def is_heading(text: str, match: re.Match) -> bool:
    """In DEFAULTS each comment line of its own is one; in main only a numbered one is."""
    in_main = match.start() > text.index("def main(")
    return not in_main or match.group(1)[2:3].isdigit()


def own(heading: str) -> bool:
    return heading.startswith(OWN)


def distributed(method: str, texts: dict[str, str]) -> str:
    """Returns the method's distributed recipe with the shared sections of the source."""
    name, shared = f"{method}_dpo_distributed", sections(texts[SOURCE])
    mine = dict(sections(texts[name]))
    if missing := [heading for heading, _ in shared if own(heading) and heading not in mine]:
        raise SystemExit(f"recipes/{name}.py: has no section {missing[0]}")
    return "".join(mine[heading] if own(heading) else part for heading, part in shared)


def single_device(twin: str, current: str | None) -> str:
    """Returns the single-device recipe of a distributed one, under the docstring that it has."""
    text = "".join(line for line in twin.splitlines(keepends=True) if not line.rstrip().endswith(MARK))
    return text if current is None else text.replace(docstring(text), docstring(current), 1)


def docstring(text: str) -> str:
    """Returns a module's docstring as it is written."""
    node = ast.parse(text).body[0]
    return "".join(text.splitlines(keepends=True)[: node.end_lineno])


def wanted() -> dict[Path, str]:
    """Returns what each recipe's text has to be."""
    paths = {path.stem: path for path in RECIPES.glob("*_dpo_*.py")}
    texts = {name: path.read_text() for name, path in paths.items()}
    result = {}
    for method in METHODS:
        twin = distributed(method, texts)
        single = f"{method}_dpo_single_device"
        result[RECIPES / f"{method}_dpo_distributed.py"] = twin
        result[RECIPES / f"{single}.py"] = single_device(twin, texts.get(single))
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--check", action="store_true")
    action.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    differing = 0
    for path, text in wanted().items():
        current = path.read_text() if path.exists() else ""
        if current == text:
            continue
        differing += 1
        if arguments.write:
            path.write_text(text)
            print(f"wrote {path.name}")
        else:
            names = (f"{path.name} as it is", f"{path.name} as it should be")
            sys.stdout.writelines(difflib.unified_diff(current.splitlines(True), text.splitlines(True), *names, n=1))
    if arguments.check and differing:
        raise SystemExit(f"\n{differing} recipes differ; edit {SOURCE}.py, then python tools/sync_recipes.py --write")
    print("the six recipes agree" if not differing else f"{differing} recipes written")


if __name__ == "__main__":
    main()
