"""The pages: size of the README, links that lead somewhere, lines and tables that can be read."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    page
    for pattern in ("*.md", "*/README.md", "*/*/README.md", "*/*/*/README.md", "tests/*/*.md")
    for page in ROOT.glob(pattern)
    if not page.relative_to(ROOT).parts[0].startswith((".", "build", "runs"))
)
README_BYTES = 10_240
COLUMNS = 7


def name(page: Path) -> str:
    """Returns a page's path from the top."""
    return page.relative_to(ROOT).as_posix()


def prose(page: Path) -> list[str]:
    """Returns the lines of a page outside its code blocks."""
    return "".join(page.read_text().split("```")[::2]).splitlines()


def anchors(page: Path) -> set[str]:
    """Returns the anchors that GitHub gives the headings of a page."""
    headings = [line.lstrip("# ") for line in prose(page) if line.startswith("#")]
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links(page: Path) -> list[str]:
    """Returns the targets of a page's links."""
    return re.findall(r"\]\(([^)\s]+)\)", "\n".join(prose(page)))


def test_the_readme_is_at_most_ten_kilobytes():
    assert (ROOT / "README.md").stat().st_size <= README_BYTES


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_to_a_file_and_a_heading(page):
    for link in links(page):
        path, _, anchor = link.partition("#")
        if path.startswith("https://"):
            continue
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{name(page)}: no {link}"
        assert not anchor or anchor in anchors(target), f"{name(page)}: no heading {link}"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_prose_has_at_most_100_columns_and_tables_seven(page):
    for line in prose(page):
        if line.startswith("|"):
            assert line.count("|") <= COLUMNS + 1, f"{name(page)}: {line}"
        elif not line.startswith("    "):  # code
            words = re.sub(r"\]\([^)]*\)", "]", line)
            assert len(words) <= 100, f"{name(page)}: {line}"


def test_every_page_is_reached_from_the_readme():
    reached, waiting = set(), [ROOT / "README.md"]
    while waiting:
        page = waiting.pop()
        if page in reached:
            continue
        reached.add(page)
        for link in links(page):
            target = (page.parent / link.partition("#")[0]).resolve()
            if target.is_file() and target.suffix == ".md":
                waiting.append(target)
    assert not set(PAGES) - reached
