"""The gates that no linter has: top level, file and function sizes, the loop's size and vocabulary."""

import ast
import subprocess
from collections.abc import Iterator
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[2]
_TOP_LEVEL = {"LICENSE", "Makefile", "README.md", "configs", "docker", "opd_ray", "pyproject.toml", "tests", "workers"}
_MAX_FILE_LINES, _MAX_FUNCTION_LINES, _MAX_LOOP_LINES = 300, 60, 99


def _sources() -> Iterator[Path]:
    for package in ("opd_ray", "workers"):
        yield from (_ROOT / package).rglob("*.py")


def _functions() -> Iterator[tuple[Path, ast.FunctionDef | ast.AsyncFunctionDef]]:
    for path in _sources():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield path, node


def test_the_top_level_holds_what_the_design_lists() -> None:
    tracked = subprocess.run(["git", "ls-files"], cwd=_ROOT, capture_output=True, text=True, check=True).stdout
    entries = {line.split("/")[0] for line in tracked.splitlines()}
    assert {e for e in entries if not e.startswith(".")} <= _TOP_LEVEL


def test_no_file_is_longer_than_the_limit() -> None:
    lengths = {str(p.relative_to(_ROOT)): len(p.read_text().splitlines()) for p in _sources()}
    assert {p: n for p, n in lengths.items() if n > _MAX_FILE_LINES} == {}


def test_no_function_is_longer_than_the_limit() -> None:
    lengths = {f"{path.name}:{f.name}": (f.end_lineno or 0) - f.lineno + 1 for path, f in _functions()}
    assert {name: n for name, n in lengths.items() if n > _MAX_FUNCTION_LINES} == {}


def test_the_loop_is_one_screen_and_tries_nothing() -> None:
    text = (_ROOT / "opd_ray" / "controller.py").read_text()
    assert len(text.splitlines()) <= _MAX_LOOP_LINES
    assert not any(isinstance(node, ast.Try) for node in ast.walk(ast.parse(text)))


def test_every_file_says_what_it_is_for() -> None:
    texts = {str(p.relative_to(_ROOT)): p.read_text() for p in _sources()}
    assert [name for name, text in texts.items() if text and not ast.get_docstring(ast.parse(text))] == []
