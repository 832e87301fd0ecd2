"""The page in a real Chromium: wide and narrow, light and dark, with the mouse and with the keyboard."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from moerge.reporting import report, write_report
from tests.reporting.browser import Browser, Page

pytestmark = pytest.mark.slow

OPEN = "document.querySelectorAll('details').forEach(part => part.open = true)"
COLUMN = "[...document.querySelector('table.sortable').tBodies[0].rows].map(row => row.cells[{0}].textContent)"
PICK = """
(() => {
  const table = [...document.querySelectorAll('table.sortable')].find(table => table.caption.textContent === 'Differences');
  table.id = 'chosen';
  table.scrollIntoView({behavior: 'instant', block: 'center'});
})()
"""


@pytest.fixture(scope="module")
def html(shared_results: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "report.html"
    write_report(report(shared_results, title="An experiment"), path)
    return path


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1280, 375])
def test_it_fits_and_nothing_complains(browser: Browser, html: Path, width: int, dark: bool) -> None:
    page = browser.open(html, width=width, dark=dark)
    for expression in ("0", OPEN):
        page.run(expression)
        assert page.run("document.documentElement.scrollWidth") <= width
        wide = page.run(
            "[...document.querySelectorAll('main *')].filter(e => !e.closest('.scroll, pre, svg') &&"
            " e.getBoundingClientRect().right > innerWidth + 1).map(e => e.outerHTML.slice(0, 80))"
        )
        assert wide == []
    ground = page.run("getComputedStyle(document.body).backgroundColor")
    assert ground == ("rgb(20, 23, 28)" if dark else "rgb(255, 255, 255)")
    assert page.complaints == []
    assert [url for url in page.requests if not url.startswith("data:image/png")] == [html.resolve().as_uri()]
    page.close()


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_charts_stand_on_white_and_scroll_where_they_are_wide(browser: Browser, html: Path, dark: bool) -> None:
    page = browser.open(html, width=375, dark=dark)
    page.run(OPEN)
    style = "[...document.querySelectorAll('.chart')].map(e => getComputedStyle(e).{})"
    assert set(page.run(style.format("backgroundColor"))) == {"rgb(255, 255, 255)"}
    assert set(page.run(style.format("color"))) == {"rgb(0, 0, 0)"}
    boxes = page.run("[...document.querySelectorAll('.chart')].map(e => [e.clientWidth, e.parentElement.clientWidth])")
    assert [box for box in boxes if not box[0] > 400 > box[1]] == []
    page.close()


OVERLAPPING = """
[...document.querySelectorAll('svg.chart')].flatMap(chart => {
  const boxes = [...chart.querySelectorAll('text')].map(text => [text.textContent, text.getBoundingClientRect()]);
  return boxes.flatMap(([name, a], i) => boxes.slice(i + 1).filter(([_, b]) =>
    a.left < b.right - 1 && b.left < a.right - 1 && a.top < b.bottom - 4 && b.top < a.bottom - 4
  ).map(([other, _]) => [chart.querySelector('title').textContent, name, other]));
})
"""


@pytest.mark.parametrize("width", [1280, 375])
def test_labels_in_charts_do_not_overlap(browser: Browser, html: Path, width: int) -> None:
    page = browser.open(html, width=width)
    page.run(OPEN)
    assert page.run(OVERLAPPING) == []
    page.close()


def test_long_names_fit_on_a_phone(browser: Browser, results: Path) -> None:
    for path in [*results.rglob("route.json"), *results.rglob("results.json"), *results.rglob("compare.json")]:
        held = path.read_text().replace("merged/", "merged/a-model-with-a-name-that-says-all-about-it-")
        path.write_text(held.replace('"math"', '"mathematics-of-the-secondary-school-and-beyond-it"'))
    write_report(report(results, title="report_of_an_experiment_whose_name_has_no_spaces"), results / "report.html")
    page = browser.open(results / "report.html", width=375)
    page.run(OPEN)
    assert page.run("document.documentElement.scrollWidth") == 375
    assert page.run(OVERLAPPING) == []
    page.close()


def sorted_by(page: Page) -> Any:
    return page.run(
        "[...document.querySelectorAll('#chosen th[aria-sort]')].filter(th => th.ariaSort !== 'none').map(th => "
        "[th.textContent, th.ariaSort])"
    )


def values(page: Page, column: int) -> list[str]:
    found: list[str] = page.run(
        f"[...document.querySelector('#chosen').tBodies[0].rows].map(row => row.cells[{column}].textContent)"
    )
    return found


def test_tables_sort_by_mouse_and_keyboard(browser: Browser, html: Path) -> None:
    page = browser.open(html)
    page.run(PICK)
    assert values(page, 4) == ["−0.1400", "25.0"]
    x, y = page.run(
        "(box => [box.x + box.width / 2, box.y + box.height / 2])"
        "(document.querySelectorAll('#chosen thead button')[4].getBoundingClientRect())"
    )
    page.click(x, y)
    assert (sorted_by(page), values(page, 4)) == ([["difference", "ascending"]], ["−0.1400", "25.0"])
    page.click(x, y)
    assert (sorted_by(page), values(page, 4)) == ([["difference", "descending"]], ["25.0", "−0.1400"])
    assert page.run("document.querySelector('[role=status]').textContent") == "Sorted by difference, descending"
    page.run("document.querySelectorAll('#chosen thead button')[1].focus()")
    page.press("Tab")
    assert page.run("document.activeElement.closest('th').textContent") == "on"
    page.press("Enter")
    assert (sorted_by(page), values(page, 2)) == ([["on", "ascending"]], ["gsm8k", "math"])
    page.press(" ")
    assert (sorted_by(page), values(page, 2)) == ([["on", "descending"]], ["math", "gsm8k"])
    assert page.complaints == []
    page.close()


def test_what_is_missing_sorts_last(browser: Browser, html: Path) -> None:
    page = browser.open(html)
    page.run(PICK.replace("'Differences'", "'Shares, accuracy and entropy by model and text'"))
    page.run(OPEN)
    heading = "[...document.querySelectorAll('#chosen th')].find(th => th.textContent.startsWith('accuracy'))"
    column = page.run(f"{heading}.cellIndex")
    for wanted in (["70", "100", "–"], ["100", "70", "–"]):
        page.run(f"{heading}.querySelector('button').click()")
        assert values(page, column) == wanted
    page.close()


def test_without_scripts_everything_is_there(browser: Browser, html: Path) -> None:
    page = browser.open(html, script=False)
    tree = page.call("Accessibility.getFullAXTree")["nodes"]
    named = {(node["role"]["value"], node.get("name", {}).get("value", "")) for node in tree if "role" in node}
    assert ("heading", "An experiment") in named
    assert {("image", name) for name in ("Benchmarks: higher is better", "routed: mean weight of each expert")} <= named
    assert "button" not in {role for role, _ in named}
    page.close()


def test_a_hostile_page_runs_nothing(browser: Browser, results: Path) -> None:
    path = results / "route" / "route.json"
    path.write_text(
        path.read_text().replace('"poems"', r'"<img src=x onerror=\"window.pwned=1\"><script>window.pwned=1</script>"')
    )
    write_report(report(results, title="<script>window.pwned = 1</script>"), results / "report.html")
    page = browser.open(results / "report.html")
    assert page.run("typeof window.pwned") == "undefined"
    assert page.run("document.querySelectorAll('img').length") == 0
    assert "<script>window.pwned=1</script>" in page.run("document.body.innerText")
    assert page.complaints == []
    page.close()


def test_an_injected_script_would_not_run(browser: Browser, html: Path, tmp_path: Path) -> None:
    """Should escaping ever fail: the policy of the page."""
    broken = tmp_path / "broken.html"
    injected = "<main id=\"main\"><script>window.pwned = 1</script><img src='x' onerror='window.pwned = 1'>"
    broken.write_text(html.read_text().replace('<main id="main">', injected))
    page = browser.open(broken)
    assert page.run("typeof window.pwned") == "undefined"
    assert len(page.complaints) >= 2
    page.close()


def test_it_prints_with_everything_open(browser: Browser, html: Path) -> None:
    page = browser.open(html)
    printed = page.call("Page.printToPDF", printBackground=True)["data"]
    assert len(printed) > 50_000
    assert page.run("document.querySelectorAll('details[open]').length") == 0
    page.close()
