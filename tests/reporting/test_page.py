"""The page as text: complete in itself, well-formed, escaped, the same bytes each time."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import sys
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from moerge.reporting import report
from tests.helpers.command import moerge
from tests.reporting.results import sequence_routes, write

pytestmark = pytest.mark.slow

HOSTILE = (
    "<script>alert(1)</script>",
    "</script><script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "'onmouseover='alert(1)",
    "<!--",
    "]]>",
    "{{ 7 * 7 }}",
    "`<b>`",
    "javascript:alert(1)",
)
VOID = {"meta", "link", "br", "img", "input", "hr"}
CHART = {"g", "path", "use", "defs", "text", "tspan", "clippath", "rect", "image", "pattern"}


class Outline(HTMLParser):
    """Elements with their attributes and text; complains of what is not nested."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[tuple[str, str]] = []
        self._open: list[str] = []
        self.feed(page)
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(dict(attrs)) == len(attrs), f"{tag} has an attribute twice"
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open:
            self.text.append((self._open[-1], data))

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    def tags(self) -> list[str]:
        """Without the marks of charts, which longer names move, and code."""
        return [tag for tag, _ in self.elements if tag not in CHART and tag != "code"]

    def ids(self) -> list[str]:
        return [str(attributes["id"]) for _, attributes in self.elements if "id" in attributes]


@pytest.fixture(scope="module")
def page(shared_results: Path) -> str:
    return report(shared_results, title="An experiment").to_html()


def embedded(page: str) -> Any:
    found = re.search(r'<script type="application/json" id="moerge-report">(.*?)</script>', page, re.DOTALL)
    assert found is not None
    return json.loads(found[1])


def test_it_is_complete_in_itself(page: str) -> None:
    outline = Outline(page)
    assert not {"link", "img", "iframe", "object", "embed", "base"} & {tag for tag, _ in outline.elements}
    for _, attributes in outline.elements:
        assert "src" not in attributes and not any(name.startswith("on") for name in attributes)
        assert (attributes.get("href") or "#").startswith(("#", "data:image/png;base64,"))
    without_data = re.sub(r"<script type=.application/json.*?</script>|data:image/png[^\"]*", "", page, flags=re.DOTALL)
    assert not re.search(r"https?:|url\((?!#)|@import|//\w", re.sub(r"  // .*", "", without_data))


def test_ids_are_unique_and_links_lead_somewhere(page: str) -> None:
    outline = Outline(page)
    ids = outline.ids()
    assert [name for name, times in Counter(ids).items() if times > 1] == []
    links = {str(link["href"])[1:] for link in outline.of("a")}
    assert links <= set(ids)
    sections = [str(section["id"]) for section in outline.of("section")]
    assert sections == ["glance", "evaluation", "similarity", "checkpoints", "routing", "learning", "tuning", "runs"]
    assert set(sections[1:]) <= links


def test_every_figure_has_words_and_its_data_as_a_table(page: str) -> None:
    outline = Outline(page)
    charts = [svg for svg in outline.of("svg") if svg.get("class") == "chart"]
    assert len(charts) > 8
    said = {str(attributes["id"]) for tag, attributes in outline.elements if tag in ("title", "desc") and "id" in attributes}
    for chart in charts:
        assert chart["role"] == "img"
        assert {chart["aria-labelledby"], chart["aria-describedby"]} <= said
    for tag in ("title", "desc", "caption", "figcaption"):
        words = [text.strip() for name, text in outline.text if name == tag]
        assert words and all(words)
    for figure in re.findall(r"<figure>.*?</figure>", page, re.DOTALL):
        assert "<table" in figure or "compare two models, use their paired differences below" in figure
    assert len(outline.of("table")) == len(outline.of("caption"))
    assert all(heading["scope"] in ("col", "row") for heading in outline.of("th"))


def test_only_its_own_script_may_run(page: str) -> None:
    outline = Outline(page)
    policy = next(str(meta["content"]) for meta in outline.of("meta") if meta.get("http-equiv") == "Content-Security-Policy")
    script = page.split("<script>")[1].split("</script>")[0]
    wanted = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policy.startswith("default-src 'none'; ")
    assert f"script-src 'sha256-{wanted}';" in policy
    assert len(outline.of("script")) == 2


@pytest.mark.parametrize("text", HOSTILE)
def test_what_files_say_is_text(text: str, results: Path, page: str) -> None:
    plain_page = Outline(page)
    for path in [*results.rglob("*.json"), *results.rglob("*.jsonl")]:
        if path.name in ("moerge.json", "route.json", "compare.json", "results.json", "coefficients.json", "tune.json"):
            held = path.read_text()
            for word in ('"math"', '"ties"', '"merged/dense"', '"merged/routed"', '"gsm8k"'):
                held = held.replace(word, json.dumps(text + word[1:-1]))
            path.write_text(held)
    made = report(results, title=text)
    assert made.found.warnings == ()
    page = made.to_html()
    outline = Outline(page)
    assert outline.tags() == plain_page.tags()
    assert {tag for tag, _ in outline.elements} <= {tag for tag, _ in plain_page.elements} | {"code"}
    assert {name for _, attributes in outline.elements for name in attributes} == {
        name for _, attributes in plain_page.elements for name in attributes
    }
    assert embedded(page) == json.loads(json.dumps(made.to_json()))
    assert text + "math" in embedded(page)["routes"][0]["texts"]


def test_the_same_files_give_the_same_bytes(shared_results: Path, page: str) -> None:
    assert report(shared_results, title="An experiment").to_html() == page


def test_what_is_missing_is_left_out_with_the_command_that_makes_it(tmp_path: Path) -> None:
    write(tmp_path / "some where" / "route.json", sequence_routes().to_json())
    page = report(tmp_path / "some where").to_html()
    outline = Outline(page)
    assert [str(section["id"]) for section in outline.of("section")] == ["glance", "routing", "runs"]
    assert "<h1>some where</h1>" in page
    for command in ("merge", "compare", "eval", "learn"):
        assert f"<code>moerge {command} " in page
    assert "<code>moerge route " not in page.split("Not on this page yet")[1]
    assert "text &#39;math&#39; was seen before" in page


def test_what_it_says(page: str) -> None:
    text = " ".join(re.sub(r"<[^>]+>", " ", page).split())
    for words in (
        "2 paired differences from base : 1 clearly better, 0 clearly worse, 1 not clear (95% intervals).",
        "by-sequence sends 100% of sequences to the text&#39;s own expert first; none of the 2 models sends more.",
        "math: base 25%, math 60%, code 15%.",
        "n = 1,200",
        "50.0 ± 6.9",
        "1.3000 ± 0.0400",
        "−0.1400",
        "not clear",
        "the objective (alignment) after each update; update 1 was kept",
        "XXH3-128",
        "2026-11-18 11:06 UTC",
        "one is short",
    ):
        assert words in text, words


@pytest.fixture
def without_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages are made much faster without them."""
    monkeypatch.setattr("moerge.figures.available", lambda: False)


@pytest.mark.usefixtures("without_figures")
def test_without_matplotlib_there_are_tables(results: Path, page: str) -> None:
    plain = report(results, title="An experiment").to_html()
    outline = Outline(plain)
    assert outline.of("svg") == [] and "<code>pip install &#39;moerge[figures]&#39;</code>" in plain.replace("'", "&#39;")
    assert outline.of("caption") == Outline(page).of("caption")
    assert "math: base 25%, math 60%, code 15%." in plain


def test_numbers_that_are_too_large_to_draw(results: Path) -> None:
    """The table has them, and the page its other figures."""
    (results / "tuned" / "metrics.jsonl").write_text('{"step": 1, "loss": 1e308}\n{"step": 2, "loss": -1e308}\n')
    outline = Outline(report(results).to_html())
    assert len(outline.of("svg")) > 5


@pytest.mark.usefixtures("without_figures")
def test_few_documents_are_pointed_out(results: Path) -> None:
    path = results / "eval" / "results.json"
    path.write_text(path.read_text().replace('"documents": 30', '"documents": 3'))
    assert (
        "Some figures are over 3 documents: the bootstrap&#39;s intervals are too short for so few." in report(results).to_html()
    )


@pytest.mark.usefixtures("without_figures")
def test_a_recipe_against_the_verdict(results: Path) -> None:
    path = results / "compare" / "compare.json"
    assert "against the verdict" not in report(results).to_html()
    path.write_text(json.dumps({**json.loads(path.read_text()), "unheeded": ["attention", "ffn"]}))
    assert "This recipe merges attention and ffn, against the verdict." in report(results).to_html()


@pytest.mark.usefixtures("without_figures")
def test_the_command(results: Path) -> None:
    result = moerge("report", results, "--title", "A <title>")
    kinds = "2 of moerge merge, 1 of moerge compare, 2 of moerge route, 1 of moerge learn, 2 of moerge tune, 1 of moerge eval"
    assert (result.code, result.err) == (0, "")
    assert result.out == f"{results / 'report.html'}: results {kinds}, 1 of moerge demo\n"
    assert "<h1>A &lt;title&gt;</h1>" in (results / "report.html").read_text()
    assert moerge("report", results).code == 0  # again, over itself
    out = results.parent / "page.html"
    found = moerge("report", results, "--out", out, "--json").json
    assert (found["report"], found["cards"], found["folder"]) == (str(out), [], "experiment")
    assert found["routes"][0]["accuracy"] == 0.7
    assert moerge("report", results, "--quiet").out == ""
    out.write_text("mine")
    refused = moerge("report", results, "--out", out)
    assert (refused.code, refused.err) == (
        2,
        f"moerge: {out} exists and is no report of moerge: choose another file with --out\n",
    )
    assert out.read_text() == "mine"
    missing = results / "nowhere" / "page.html"
    assert moerge("report", results, "--out", missing).err == f"moerge: cannot write {missing}: No such file or directory\n"


def test_without_jinja2(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    result = moerge("report", results)
    assert (result.code, result.err) == (2, "moerge: a report needs jinja2: pip install 'moerge[report]'\n")
    assert not (results / "report.html").exists()
