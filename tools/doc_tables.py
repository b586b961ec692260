"""Makes the tables that docs print of the code: losses.md of the losses' classes, coming_from.md of others' names.

python tools/doc_tables.py --check     # exits 1 if a page has another
python tools/doc_tables.py --write
"""

import argparse
import inspect
import re
from pathlib import Path

from pairtune.config.names_elsewhere import ROWS, Elsewhere
from pairtune.losses.base import Loss
from pairtune.losses.modules import LOSSES

DOCS = Path(__file__).parents[1] / "docs"
HEADERS = {
    "losses.md": "| `loss=` | what it is | options |\n| --- | --- | --- |\n",
    "coming_from.md": "| there | whose | here |\n| --- | --- | --- |\n",
}


def loss_rows() -> str:
    """Returns a row a loss, in the order of the classes: names, the docstring's first line, options."""
    return "".join(map(loss_row, LOSSES.values()))


def loss_row(loss: type[Loss]) -> str:
    names = " or ".join(f"`{name}`" for name in (loss.name, *loss.aliases))
    what = inspect.getdoc(loss).partition("\n")[0].removesuffix(".")
    options = ", ".join(map(option, inspect.signature(loss).parameters.values()))
    return f"| {names} | {what} | {options} |\n"


def option(parameter: inspect.Parameter) -> str:
    """A number is told with its default, which is the loss's own; what is off by default goes without."""
    is_number = type(parameter.default) in (int, float) and parameter.name != "ld_alpha"
    return f"`{parameter.name}={parameter.default:g}`" if is_number else f"`{parameter.name}`"


def names_rows() -> str:
    """Returns a row for names that mean the same, under what they are about."""
    return "".join(f"| **{about}** | | |\n" + "".join(map(names_row, rows)) for about, rows in ROWS.items())


def names_row(names: Elsewhere) -> str:
    there = " ".join(f"`{word}`" for word in names.words)
    here = [said(names.says("")), *(f"`{value}`: {said(text)}" for value, text in names.when.items())]
    return f"| {there} | {names.systems} | {'; '.join(dict.fromkeys(here))} |\n"


def said(text: str) -> str:
    """A sentence's key=value in the type of code."""
    return re.sub(r"(?<![`\w])[a-z][\w.]*=(?:\[[^\]]*\]|[^\s,;:]+)", lambda found: f"`{found[0]}`", text)


def with_table(name: str) -> str:
    """Returns a page with its table as it should be."""
    page, header = (DOCS / name).read_text(), HEADERS[name]
    rows = loss_rows() if name == "losses.md" else names_rows()
    found = re.search(re.escape(header) + r"(?:\|.*\n)*", page)
    if not found:
        raise SystemExit(f"{DOCS / name}: has no table with this head:\n{header}")
    return page[: found.start()] + header + rows + page[found.end() :]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--check", action="store_true")
    action.add_argument("--write", action="store_true")
    writes = parser.parse_args().write
    for name in HEADERS:
        page = with_table(name)
        if writes:
            (DOCS / name).write_text(page)
        elif (DOCS / name).read_text() != page:
            raise SystemExit(f"{DOCS / name}: its table is not what the code says; python tools/doc_tables.py --write")


if __name__ == "__main__":
    main()
