"""What the pages name is there."""

import re
import runpy
from pathlib import Path

import pytest
from helpers import ROOT

from pairtune.cli import plan
from pairtune.cli.find import own
from pairtune.cli.recipe import read_recipe
from pairtune.losses.modules import LOSSES

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def anchors(page):
    """GitHub's names of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)]+)\)", page.read_text())
    for link in (link for link in links if not link.startswith("https://")):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.is_relative_to(ROOT) and target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_name_files_that_are_there(page):
    named = re.findall(r"\b((?:tools|tests|recipes|configs)/[\w/.]+\.(?:py|yaml))\b", page.read_text())
    made = re.findall(r"^--- /dev/null\n\+\+\+ b/(.*)$", page.read_text(), re.MULTILINE)  # by a change that it shows
    assert [name for name in named if not (ROOT / name).exists() and name not in made] == []
    tests = {path.name for path in (ROOT / "tests").rglob("test_*.py")} | {Path(name).name for name in made}
    assert set(re.findall(r"`(test_\w+\.py)`", page.read_text())) <= tests


def test_every_page_is_linked_from_the_readme_or_from_its_folders():
    readme = PAGES[0].read_text()
    for page in PAGES[1:]:
        in_folder = page.parent.name != "docs" and page.name != "README.md"
        linked = f"]({page.name}" in (page.parent / "README.md").read_text() if in_folder else True
        assert linked and (in_folder or f"({page.relative_to(ROOT)}" in readme), page


def test_the_pages_name_every_loss():
    (row,) = re.findall(r"^\| \[losses\].*$", PAGES[0].read_text(), re.MULTILINE)
    assert set(re.findall(r"`(\w+)`", row)) == LOSSES.keys()


@pytest.mark.parametrize("page", ["losses.md", "coming_from.md"])
def test_a_table_that_a_page_prints_is_the_codes(page):
    tool = runpy.run_path(str(ROOT / "tools" / "doc_tables.py"))
    assert (ROOT / "docs" / page).read_text() == tool["with_table"](page), "python tools/doc_tables.py --write"


@pytest.mark.parametrize("recipe", own("recipe"))
def test_the_readme_tells_what_is_counted_on_a_gpu(recipe):
    row = re.search(rf"^\| \[`{recipe}`\].*$", PAGES[0].read_text(), re.MULTILINE)[0]
    told, gpus = re.search(r"\| ([\d.]+)(?: on (\d+))? \|", row).groups()
    counted = plan.plan(plan.Run(recipe, (ROOT / "configs" / "llama3_8b.yaml",), gpus=int(gpus or 1)), read_recipe)
    assert f"{counted.peak / plan.GIB:.1f}" == told
