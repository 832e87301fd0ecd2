"""Every code block of the documentation runs here, page by page and from top to bottom, beside tiny checkpoints.

What a fence's language and words mean:

    python                executed; the page's python blocks share their names
    python file=NAME      saved as a module that later blocks use
    toml file=NAME        saved; a pyproject.toml's entry points are registered, as installing the package would
    yaml                  a recipe, saved as recipe.yaml (or file=NAME), planned, merged and verified; a part of a recipe is
                          completed with base and experts
    yaml tune             settings of `moerge tune`, saved as tune.yaml (or file=NAME)
    yaml reduce           a recipe of `moerge reduce`, saved as reduce.yaml (or file=NAME)
    yaml search           a SEARCH.yaml of `moerge search`, saved as search.yaml (or file=NAME)
    yaml broken           the same as yaml, except that it must be refused; later blocks show how
    console               `$ ` starts a command, moerge's or `echo $?`; the lines below are its output, `...` being anything
    text output           what the python block before it printed
    text, json, math      not code

A block that cannot run has the comment `<!-- not run: REASON -->` above it.
"""

from __future__ import annotations

import importlib
import json
import re
import shlex
import shutil
import signal
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

import moerge
from moerge import registry
from moerge.cli import main
from moerge.cli.app import app
from moerge.errors import Code
from moerge.methods import merge_method, merge_methods
from moerge.recipe.loading import _SECTIONS
from moerge.recipe.mergekit import is_mergekit
from moerge.recipe.schema import MoE
from tests.helpers import tiny

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *DOCS.rglob("*.md")])
EXAMPLES = ROOT / "examples" / "recipes"
PLAIN = ("text", "json", "math")
FENCE = re.compile(r"^(?P<indent> *)```(?P<language>\w*) *(?P<words>.*)$")
NOT_RUN = re.compile(r"<!-- not run: (?P<reason>.*) -->")


@dataclass
class Snippet:
    page: Path
    line: int
    language: str
    words: list[str]
    skipped: str | None
    code: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "\n".join(self.code) + "\n"

    @property
    def file(self) -> str | None:
        return next((word.removeprefix("file=") for word in self.words if word.startswith("file=")), None)

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def snippets(page: Path) -> list[Snippet]:
    found: list[Snippet] = []
    inside, indent, above = False, 0, ""
    for number, line in enumerate(page.read_text().splitlines(), 1):
        fence = FENCE.match(line)
        if inside and fence and not fence["language"]:
            inside, above = False, ""
        elif inside:
            found[-1].code.append(line[indent:])
        elif fence:
            reason = NOT_RUN.search(above)
            inside, indent = True, len(fence["indent"])
            found.append(Snippet(page, number, fence["language"], fence["words"].split(), reason and reason["reason"]))
        elif line.strip():
            above = line
    assert not inside, f"{page} ends inside a code block"
    return found


class Session:
    """One page's blocks, run in the working directory."""

    def __init__(self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        self.capsys, self.monkeypatch = capsys, monkeypatch
        self.names: dict[str, Any] = {"__name__": "docs"}
        self.printed, self.code, self.merged = "", 0, 0

    def run(self, snippet: Snippet) -> None:
        if snippet.skipped is not None:
            assert len(snippet.skipped) > 10, f"{snippet}: say why this block is not run"
        elif snippet.language == "text" and "output" in snippet.words:
            assert_output(self.printed, snippet.text, snippet)
        elif snippet.language not in PLAIN:
            assert snippet.language in ("python", "toml", "yaml", "console"), f"{snippet}: what language is this?"
            getattr(self, f"run_{snippet.language}")(snippet)

    def run_python(self, snippet: Snippet) -> None:
        if snippet.file:
            Path(snippet.file).parent.mkdir(parents=True, exist_ok=True)
            Path(snippet.file).write_text(snippet.text)
            importlib.invalidate_caches()
            return
        exec(compile("\n" * snippet.line + snippet.text, str(snippet.page), "exec"), self.names)
        self.printed = self.capsys.readouterr().out

    def run_toml(self, snippet: Snippet) -> None:
        project = tomllib.loads(snippet.text)["project"]
        metadata = Path(f"{project['name'].replace('-', '_')}-{project['version']}.dist-info")
        metadata.mkdir()
        (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
        groups = project["entry-points"].items()
        sections = [f"[{group}]\n" + "\n".join(f"{name} = {value}" for name, value in points.items()) for group, points in groups]
        (metadata / "entry_points.txt").write_text("\n".join(sections))
        importlib.invalidate_caches()
        registry._entry_points.cache_clear()

    def run_yaml(self, snippet: Snippet) -> None:
        other = next((word for word in ("tune", "reduce", "search") if word in snippet.words), None)
        path = Path(snippet.file or f"{other or 'recipe'}.yaml")
        path.write_text(snippet.text)
        if other:
            return
        recipe: Any = path
        written = yaml.safe_load(snippet.text)
        if "experts" not in written and not is_mergekit(written) and "broken" not in snippet.words:
            recipe = {"base": "models/base", "experts": {name: f"models/{name}" for name in tiny.EXPERTS}, **written}
        self.merged += 1
        out = Path(f".merged-{self.merged}")
        if "broken" in snippet.words:
            with pytest.raises(moerge.InputError):
                moerge.merge(recipe, out, threads=1)
            assert not out.exists()
            return
        plan = moerge.plan(recipe)
        if plan.recipe.output is None:
            moerge.merge(plan, out, threads=1)
        else:
            moerge.merge_adapters(recipe, out, threads=1)
        assert moerge.verify(out, threads=1).problems == (), str(snippet)

    def run_console(self, snippet: Snippet) -> None:
        commands = re.split(r"^\$ ", snippet.text.replace("\\\n", " "), flags=re.MULTILINE)
        assert not commands[0].strip(), f"{snippet}: a console block starts with '$ '"
        failed = ""
        for command in commands[1:]:
            line, _, expected = command.partition("\n")
            if line == "echo $?":
                assert_output(f"{self.code}\n", expected, snippet)
                failed = ""
                continue
            assert not failed, f"{snippet}: {failed}"
            output = self.command(line, snippet)
            if expected.strip():
                assert_output(output, expected, snippet)
            failed = f"`{line}` exits with {self.code}: {output}" if self.code else ""
        assert not failed, f"{snippet}: {failed}"

    def command(self, line: str, snippet: Snippet) -> str:
        words = shlex.split(line, comments=True)
        assert words[0] == "moerge", f"{snippet}: only moerge runs here, not {words[0]!r}"
        self.monkeypatch.setattr(sys, "argv", words)
        handler = signal.getsignal(signal.SIGTERM)
        self.capsys.readouterr()
        try:
            with pytest.raises(SystemExit) as ended:
                main()
        finally:
            signal.signal(signal.SIGTERM, handler)
        self.code = int(ended.value.code or 0)
        captured = self.capsys.readouterr()
        return captured.out + captured.err


def assert_output(actual: str, expected: str, snippet: Snippet) -> None:
    pattern = r".*".join(re.escape(" ".join(part.split())) for part in expected.split("..."))
    flat = " ".join(actual.split())
    assert re.fullmatch(pattern.replace(r".*\ ", ".*").replace(r"\ .*", ".*"), flat), (
        f"{snippet} shows another output than:\n{actual}"
    )


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the pages call `models`: base, math, code, knowledge, and a first OLMo, whose family moerge does not know."""
    folder = tmp_path_factory.mktemp("docs") / "models"
    tiny.make_models(folder)
    config = tiny.llama_config(model_type="olmo", architectures=["OlmoForCausalLM"])
    tensors = {name: value for name, value in tiny.llama_tensors(config).items() if "norm" not in name}
    tiny.write_checkpoint(folder / "olmo", tensors, config)
    return folder


@pytest.fixture
def session(
    tmp_path: Path, models: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Session]:
    shutil.copytree(models, tmp_path / "models")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setattr("moerge.progress._PATIENCE_SECONDS", 600.0)  # no progress between the lines, however slow the machine is
    monkeypatch.syspath_prepend(tmp_path)
    yield Session(capsys, monkeypatch)
    registry._entry_points.cache_clear()
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", None) or "").startswith(str(tmp_path)):
            del sys.modules[name]


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_page_runs(page: Path, session: Session) -> None:
    blocks = snippets(page)
    for index, snippet in enumerate(blocks):
        session.run(snippet)
        if "broken" in snippet.words or (snippet.language == "python" and snippet.file):
            name = Path(snippet.file or "recipe.yaml").stem
            assert any(name in later.text for later in blocks[index + 1 :]), f"{snippet}: no later block uses {name}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    prose = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", prose):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path) if path else page
        assert linked.exists(), f"{page.relative_to(ROOT)} links to {target}"
        if anchor:
            assert anchor in anchors(linked), f"{page.relative_to(ROOT)} links to {target}"


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives headings."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL), flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_page_is_on_the_map() -> None:
    linked = set(re.findall(r"\]\(([\w/.-]+\.md)\)", (DOCS / "index.md").read_text()))
    pages = {str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md")} - {"index.md"}
    assert pages <= linked, f"docs/index.md does not link to {sorted(pages - linked)}"


@pytest.mark.parametrize("name", merge_methods())
def test_method_pages_give_every_default(name: str) -> None:
    page = next(page for page in (DOCS / "methods").glob("*.md") if f"`method: {name}`" in page.read_text())
    rows = re.findall(r"^\| `(\w+)` \| (.*?) \|", page.read_text(), flags=re.MULTILINE)
    fields = merge_method(name).model_fields
    own = {row: default for row, default in rows if row in fields}
    assert set(own) == set(fields), f"{page.name} documents {sorted(own)} of {sorted(fields)}"
    for key, info in fields.items():
        expected = "required" if info.is_required() else info.default
        message = f"{page.name}: {key} defaults to {expected}, not {own[key]}"
        assert own[key] == expected or same_default(own[key], expected), message


def same_default(written: str, actual: object) -> bool:
    if isinstance(actual, bool) or not isinstance(actual, int | float):
        return written.strip("`") == str(actual).lower()
    return float(Fraction(written)) == float(actual)


def test_recipe_page_names_every_key() -> None:
    text = (DOCS / "recipe.md").read_text()
    missing = [
        key
        for key in (*_SECTIONS, *MoE.model_fields, "weight", "model", "method", "overrides", "match")
        if f"`{key}`" not in text
    ]
    assert missing == []


def test_troubleshooting_quotes_real_messages() -> None:
    source = "\n".join(path.read_text() for path in (ROOT / "src" / "moerge").rglob("*.py"))
    joined = re.sub(r'"\s+f?"', "", source)
    headings = re.findall(r"^### (.*)$", (DOCS / "troubleshooting.md").read_text(), flags=re.MULTILINE)
    parts = [part.strip() for heading in headings for quoted in re.findall(r"`(.*?)`", heading) for part in quoted.split("...")]
    assert len(parts) > 20
    assert [part for part in parts if part not in joined] == []


def test_command_line_page_names_every_option() -> None:
    import typer

    text = (DOCS / "cli.md").read_text()
    group = typer.main.get_command(app)
    wanted = {option for command in group.commands.values() for parameter in command.params for option in parameter.opts}
    assert sorted(option for option in wanted if option.startswith("--") and f"`{option}" not in text) == []
    assert sorted(name for name in group.commands if f"## moerge {name}" not in text) == []


@pytest.mark.parametrize(
    "command", ["plan recipe.yaml", "compare recipe.yaml --quiet", "merge recipe.yaml out", "verify out", "inspect out"]
)
def test_command_line_page_names_every_json_key(command: str, session: Session) -> None:
    tiny.write_recipe(Path(), base="models/base", experts={name: f"models/{name}" for name in tiny.EXPERTS})
    if command.endswith(" out") and not command.startswith("merge"):
        moerge.merge("recipe.yaml", "out", threads=1)
    output = session.command(f"moerge {command} --json", Snippet(DOCS / "cli.md", 0, "console", [], None))
    text = (DOCS / "cli.md").read_text()
    assert [key for key in json.loads(output) if f"`{key}`" not in text] == []


def test_command_line_page_names_every_error_code() -> None:
    table = (DOCS / "cli.md").read_text().partition("| code |")[2].partition("\n\n")[0]
    first = "".join(line.split("|")[1] for line in table.splitlines()[2:])
    assert sorted(re.findall("`(.*?)`", first)) == sorted(get_args(Code))


def test_python_page_names_every_public_object() -> None:
    text = (DOCS / "python.md").read_text()
    assert [name for name in moerge.__all__ if not re.search(rf"`(moerge\.)?{name}\b", text)] == []


OPERATIONS = {
    "average.yaml": {"average": 21},
    "branch-train-mix.yaml": {"average": 15, "draw": 2, "copy": 24},
    "dare.yaml": {"dare": 21},
    "mergeme-dare-moe.yaml": {"dare": 15, "draw": 2, "copy": 24},
    "mergeme-sequence-routed.yaml": {"dare": 7, "copy": 56},
    "mergeme-ties-moe.yaml": {"ties": 15, "draw": 2, "copy": 24},
    "overrides.yaml": {"ties": 8, "average": 12, "task_arithmetic": 1},
    "slerp.yaml": {"slerp": 21},
    "ties.yaml": {"ties": 21},
    "unlearn.yaml": {"task_arithmetic": 21},
}


def test_examples_are_all_tested() -> None:
    assert sorted(path.name for path in EXAMPLES.iterdir()) == sorted(OPERATIONS)


@pytest.mark.parametrize("name", OPERATIONS)
def test_example_recipe(name: str, session: Session) -> None:
    shutil.copy(EXAMPLES / name, name)
    plan = moerge.plan(name)
    assert plan.summary(1)["operations"] == OPERATIONS[name]
    moerge.merge(plan, "out", threads=1)
    assert moerge.verify("out", threads=1).problems == ()
