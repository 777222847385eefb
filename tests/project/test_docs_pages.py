"""The documents as a whole: links lead somewhere, Python blocks run, generated pages are fresh, README is short."""

import ast
import inspect
import os
import re
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from types import CodeType

import pytest
import yaml

import limiter
from limiter import CreditLimiter
from tests.support.paths import ROOT

PAGES = sorted(
    path
    for folder in (ROOT, ROOT / "docs", ROOT / ".github", ROOT / "benchmarks", ROOT / "examples")
    for path in (folder.glob("*.md") if folder == ROOT else folder.rglob("*.md"))
    if "_build" not in path.parts
)
README = (ROOT / "README.md").read_text(encoding="utf-8")
MAX_README_LINES = 150
FENCE = re.compile(
    r"^(?P<indent> *)(?P<fence>```+|~~~+)(?P<info>[^\n]*)\n(?P<body>.*?)^ *(?P=fence) *$", re.MULTILINE | re.DOTALL
)
LINK = re.compile(r"!?\[(?:[^\]\[]|\[[^\]]*\])*\]\(([^)\s]+)\)")
EXAMPLE_URL = "redis://localhost:6379/0"


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def text_of(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def prose(path: Path) -> str:
    """A page without its code, in which nothing is a link."""
    return re.sub(r"`[^`\n]+`", "", FENCE.sub("", path.read_text(encoding="utf-8")))


def anchors(path: Path) -> set[str]:
    """The anchors that a forge, and MyST, give to the headings of a page."""
    text = FENCE.sub("", path.read_text(encoding="utf-8"))
    headings = re.findall(r"^#+ +(.+?) *$", text, re.MULTILINE)
    texts = [re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", each) for each in headings]
    return {re.sub(r"[^\w\- ]", "", each).lower().replace(" ", "-") for each in texts}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_page_when_it_links_within_the_repository_then_the_link_leads_somewhere(page: Path) -> None:
    broken = []
    for link in LINK.findall(prose(page)):
        if re.match(r"[a-z]+:", link):
            continue
        target, _, anchor = link.partition("#")
        path = (page.parent / target).resolve() if target else page
        if not path.exists() or (anchor and path.suffix == ".md" and anchor not in anchors(path)):
            broken.append(link)
    assert not broken


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_page_when_it_begins_then_with_its_one_title(page: Path) -> None:
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    if page.parts[len(ROOT.parts)] != ".github":
        assert len(re.findall(r"^# ", text, re.MULTILINE)) == 1
        assert text.startswith("# ")


def test_pages_when_they_are_in_docs_then_the_index_leads_to_each() -> None:
    docs = ROOT / "docs"
    listed = {
        (page.parent / entry).resolve().with_suffix(".md")
        for page in docs.rglob("index.md")
        for fence in FENCE.finditer(page.read_text(encoding="utf-8"))
        if fence["info"] == "{toctree}"
        for entry in fence["body"].splitlines()
        if entry and not entry.startswith(":")
    }
    assert {page for page in PAGES if page.is_relative_to(docs)} == {docs / "index.md", *listed}


def python_blocks(page: Path) -> Iterator[tuple[int, str]]:
    """The blocks of a page that are Python to run: their line and their text."""
    text = page.read_text(encoding="utf-8")
    for fence in FENCE.finditer(text):
        if fence["info"].strip() == "python":
            yield text.count("\n", 0, fence.start("body")), inspect.cleandoc(fence["body"])


def test_blocks_when_they_are_searched_then_there_are_some() -> None:
    with_blocks = [name_of(page) for page in PAGES if any(python_blocks(page))]
    assert {"README.md", "docs/reference/python-api.md", "docs/tutorial/library.md"} <= set(with_blocks)


@pytest.mark.parametrize("page", [page for page in PAGES if any(python_blocks(page))], ids=name_of)
async def test_page_when_its_python_blocks_run_in_order_then_none_fails(
    page: Path, limiter: CreditLimiter, redis_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    served: list[object] = []

    async def serve_from(backend: object) -> None:
        served.append(backend)

    names: dict[str, object] = {"install_id": str(uuid.uuid4()), "limiter": limiter, "serve_from": serve_from}
    for line, text in python_blocks(page):
        code = compiled("\n" * line + text.replace(EXAMPLE_URL, f"{redis_url}"), page)
        result = eval(code, names)  # noqa: S307  the project's own documents
        if inspect.iscoroutine(result):
            await result
    client = names.get("redis")
    if client is not None:
        await client.aclose()  # type: ignore[attr-defined]  # what `connect` gave to the page
    assert not served or served == ["gemini"]


def compiled(text: str, page: Path) -> CodeType:
    code: CodeType = compile(text, name_of(page), "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    return code


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_page_when_a_block_is_python_that_cannot_run_then_a_comment_says_why(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for fence in FENCE.finditer(text):
        if fence["info"].strip() == "py":
            assert re.search(r"<!-- not run: .+ -->\s*$", text[: fence.start()]), fence["body"]


def test_generated_pages_when_they_are_compared_then_they_are_fresh() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "docs/generate.py", "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_picture_when_it_is_drawn_anew_then_it_is_the_one_that_is_there(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    copy = tmp_path / "docs/picture.py"
    copy.write_bytes((ROOT / "docs/picture.py").read_bytes())
    subprocess.run([sys.executable, copy], check=True)
    assert (tmp_path / "docs/images/overview.svg").read_text() == (ROOT / "docs/images/overview.svg").read_text()


def test_documents_when_they_are_built_then_without_a_warning(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONWARNINGS": ""}
    options = ("-q", "-W", "--keep-going", "-b", "html")
    done = subprocess.run(
        [sys.executable, "-m", "sphinx", *options, ROOT / "docs", tmp_path],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "index.html").exists()


def test_readme_when_counted_then_it_is_short() -> None:
    assert len(README.splitlines()) <= MAX_README_LINES


def test_readme_shows_the_two_commands() -> None:
    assert "make run" in README
    assert "make test" in README


def test_contributing_when_it_lists_packages_then_it_lists_all_that_have_modules() -> None:
    text = text_of("CONTRIBUTING.md")
    listed = re.findall(r"^\| `(limiter\.[\w.]+)` \|", text, re.MULTILINE)
    folders = [path.parent for path in sorted((ROOT / "limiter").rglob("__init__.py"))]
    real = {".".join(folder.relative_to(ROOT).parts) for folder in folders} - {"limiter", "limiter.relay"}
    assert set(listed) == real


def test_contributing_when_it_names_a_file_then_it_is_there() -> None:
    text = FENCE.sub("", text_of("CONTRIBUTING.md"))
    named = re.findall(r"`((?:limiter|tests|docs|lua|benchmarks)/[\w./-]+)`", text)
    assert named
    assert [path for path in named if "NAME" not in path and not (ROOT / path).exists()] == []


def test_contributing_when_it_names_a_target_of_make_then_it_is_there() -> None:
    makefile = text_of("Makefile")
    for page in ("CONTRIBUTING.md", "README.md", ".pre-commit-config.yaml", ".github/workflows/ci.yml"):
        for target in re.findall(r"(?:^|[` ])make ([a-z][a-z-]+)\b(?! makes)", text_of(page), re.MULTILINE):
            assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"{page}: make {target}"


def test_contributing_when_it_lists_variables_of_the_tests_then_it_lists_all() -> None:
    text = text_of("CONTRIBUTING.md")
    used = {
        name
        for path in (ROOT / "tests").rglob("*.py")
        if path != Path(__file__)
        for name in re.findall(r"LIMITER_TEST_[A-Z_]*[A-Z]", path.read_text(encoding="utf-8"))
    }
    assert set(re.findall(r"LIMITER_TEST_[A-Z_]*[A-Z]", text)) == used


def test_workflow_when_it_is_read_then_it_runs_everything_and_a_matrix_of_pythons_and_servers() -> None:
    document = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8"))
    jobs = document["jobs"]
    runs = {name: [step["run"] for step in job["steps"] if "run" in step] for name, job in jobs.items()}
    assert any(run.startswith("make test") for run in runs["everything"])
    assert jobs["python"]["strategy"]["matrix"]["python"] == ["3.11", "3.13", "3.14"]
    assert len(jobs["servers"]["strategy"]["matrix"]["image"]) > 1
    for run in (each for steps in runs.values() for each in steps):
        for folder in re.findall(r"\btests/\w+", run):
            assert (ROOT / folder).is_dir(), run


def test_hooks_when_they_are_read_then_each_runs_a_tool_of_the_environment() -> None:
    document = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    hooks = [hook for repo in document["repos"] for hook in repo["hooks"]]
    assert {repo["repo"] for repo in document["repos"]} == {"local"}
    assert {"ruff", "mypy", "luacheck", "codespell", "import-linter"} <= {hook["id"] for hook in hooks}
    assert all(hook["entry"].startswith((".venv/bin/", "make ")) for hook in hooks)


def test_python_page_when_read_then_it_names_every_public_name() -> None:
    page = text_of("docs/reference/python-api.md")
    documented = set(re.findall(r"^\.\. auto\w+:: limiter\.(\w+)$", page, re.MULTILINE))
    explained_elsewhere = {
        "DecisionStatus",
        "SettlementStatus",
        "PutStatus",
        "Reason",
    }  # the tables of statuses and of error codes
    assert documented == set(limiter.__all__) - explained_elsewhere
    assert all(f"`{name}`" in page for name in explained_elsewhere)
