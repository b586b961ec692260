"""Makes the table of losses in docs/losses.md from their classes: names, docstrings' first lines, options.

python tools/losses_table.py --check     # exits 1 if the page has another
python tools/losses_table.py --write
"""

import argparse
import inspect
import re
from pathlib import Path

from pairtune.losses.base import Loss
from pairtune.losses.modules import LOSSES

PAGE = Path(__file__).parents[1] / "docs" / "losses.md"
HEADER = "| `loss=` | what it is | options |\n| --- | --- | --- |\n"


def table() -> str:
    """Returns the table: a row a loss, in the order of the classes."""
    return HEADER + "".join(map(row, LOSSES.values()))


def row(loss: type[Loss]) -> str:
    names = " or ".join(f"`{name}`" for name in (loss.name, *loss.aliases))
    what = inspect.getdoc(loss).partition("\n")[0].removesuffix(".")
    options = ", ".join(map(option, inspect.signature(loss).parameters.values()))
    return f"| {names} | {what} | {options} |\n"


def option(parameter: inspect.Parameter) -> str:
    """A number is told with its default, which is the loss's own; what is off by default goes without."""
    is_number = type(parameter.default) in (int, float) and parameter.name != "ld_alpha"
    return f"`{parameter.name}={parameter.default:g}`" if is_number else f"`{parameter.name}`"


def with_table(page: str) -> str:
    """Returns the page with the table as it should be."""
    found = re.search(re.escape(HEADER) + r"(?:\|.*\n)*", page)
    if not found:
        raise SystemExit(f"{PAGE}: has no table with this head:\n{HEADER}")
    return page[: found.start()] + table() + page[found.end() :]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--check", action="store_true")
    action.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    page = PAGE.read_text()
    if arguments.write:
        PAGE.write_text(with_table(page))
    elif page != with_table(page):
        raise SystemExit(f"{PAGE}: its table is not that of the losses; python tools/losses_table.py --write")


if __name__ == "__main__":
    main()
