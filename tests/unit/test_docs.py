"""The pages name what is there: links, commands, targets of make, functions."""

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LEFT_OUT = {".venv", "build", "demo", "demo-real", "own", "runs", "node_modules"}
PAGES = sorted(p for p in ROOT.rglob("*.md") if not {*p.relative_to(ROOT).parts} & LEFT_OUT)
EXAMPLE = "kernels/bench/squared_relu.py"
"""Made by who follows the recipe for an operator."""
HISTORY = {*(ROOT / "docs" / "lab-log").glob("*.md"), ROOT / "CHANGELOG.md"}
"""Pages that say what was once run, whatever became of the scripts."""
SCRIPTS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["scripts"]
SOURCES = {
    p: p.read_text(encoding="utf-8")
    for folder in ("megamm", "kernels/megamm_kernels", "laws/megamm_laws")
    for p in sorted((ROOT / folder).rglob("*.py"))
}


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def anchors(text: str) -> set[str]:
    """Names under which GitHub links to the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", h.lower()).strip().replace(" ", "-") for h in headings}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_relative_links(page):
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if re.match(r"[a-z]+:", link):  # of the web
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        found = target.exists() and target.is_relative_to(ROOT)
        if not found or (anchor and anchor not in anchors(target.read_text(encoding="utf-8"))):
            broken.append(link)
    assert not broken


def commands(page: Path) -> list[str]:
    """Indented and fenced lines, and code within sentences."""
    text = page.read_text(encoding="utf-8")
    return re.findall(r"^ {4}(\S.*)$", text, re.M) + re.findall(r"`([^`\n]+)`", text)


@pytest.mark.parametrize("page", [page for page in PAGES if page not in HISTORY], ids=name_of)
def test_commands_exist(page):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    wrong = []
    for command in commands(page):
        words = command.split("#")[0].split()
        wrong += [w for w in words if re.fullmatch(r"megamm-[a-z-]+", w) and w not in SCRIPTS]
        paths = [w for w in words if re.fullmatch(r"(tools|examples|benchmarks|kernels/bench)/[\w./-]+\.\w+", w)]
        wrong += [w for w in paths if not (ROOT / w).exists() and w != EXAMPLE]
        if words[:1] == ["make"]:
            wrong += [w for w in words[1:] if re.fullmatch(r"[a-z-]+", w) and w not in targets]
        if "-m" in words and words[words.index("-m") + 1].startswith("megamm"):
            module = words[words.index("-m") + 1]
            wrong += [] if (ROOT / module.replace(".", "/")).with_suffix(".py").exists() else [module]
    assert not wrong


def test_readme_has_commands():
    found = commands(ROOT / "README.md")
    assert sum(c.startswith("megamm-") for c in found) > 10 and "make demo" in " ".join(found)


def test_scripts_name_functions():
    for script, target in SCRIPTS.items():
        module, _, function = target.partition(":")
        path = next((p for p in SOURCES if ".".join(p.with_suffix("").parts).endswith(f".{module}")), None)
        assert path and f"\ndef {function}(" in SOURCES[path], f"{script} = {target}"


def test_architecture_names_functions():
    """`data/rows.py: fill_row` is a file of ours, and defines that name."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    named = re.findall(r"`([\w/]+\.py)(?:: ([\w.]+)[^`]*)?`", text)
    assert len(named) > 30
    for path, name in named:
        sources = [source for p, source in SOURCES.items() if str(p).endswith(f"/{path}")]
        assert sources or (ROOT / path).exists(), path
        for part in filter(None, name.split(".")):
            assert any(re.search(rf"\b(def|class) {part}\b", source) for source in sources), f"{path}: {part}"
