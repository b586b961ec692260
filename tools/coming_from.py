"""Makes the table of docs/coming_from.md from pairtune/config/names_elsewhere.py.

python tools/coming_from.py --check     # exits 1 if the page has another
python tools/coming_from.py --write
"""

import argparse
import re
from pathlib import Path

from pairtune.config.names_elsewhere import ROWS, Elsewhere

PAGE = Path(__file__).parents[1] / "docs" / "coming_from.md"
HEADER = "| there | whose | here |\n| --- | --- | --- |\n"


def table() -> str:
    """Returns the table: a row for names that mean the same, under what they are about."""
    return HEADER + "".join(f"| **{about}** | | |\n" + "".join(map(row, rows)) for about, rows in ROWS.items())


def row(names: Elsewhere) -> str:
    there = " ".join(f"`{word}`" for word in names.words)
    here = [said(names.says(None)), *(f"`{value}`: {said(text)}" for value, text in names.when.items())]
    return f"| {there} | {names.systems} | {'; '.join(dict.fromkeys(here))} |\n"


def said(text: str) -> str:
    """A sentence's key=value in the type of code."""
    return re.sub(r"(?<![`\w])[a-z][\w.]*=(?:\[[^\]]*\]|[^\s,;:]+)", lambda found: f"`{found[0]}`", text)


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
    page = PAGE.read_text()
    if parser.parse_args().write:
        PAGE.write_text(with_table(page))
    elif page != with_table(page):
        raise SystemExit(f"{PAGE}: its table is not that of names_elsewhere.py; python tools/coming_from.py --write")


if __name__ == "__main__":
    main()
