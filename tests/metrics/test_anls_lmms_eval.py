"""ANLS against the function that lmms-eval scores DocVQA and InfoVQA with, taken from the source file it installs."""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rice_eval.metrics.text import anls

Theirs = Callable[[list[str], list[str]], dict[str, float]]


@pytest.fixture(scope="module")
def theirs() -> Theirs:
    """Its two functions alone: importing the package takes seconds and registers a few hundred metrics."""
    spec = importlib.util.find_spec("lmms_eval")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("lmms-eval is not installed")
    path = Path(spec.submodule_search_locations[0]) / "api" / "metrics.py"
    wanted = {"levenshtein_distance", "anls"}
    nodes = [n for n in ast.parse(path.read_text()).body if isinstance(n, ast.FunctionDef) and n.name in wanted]
    assert {n.name for n in nodes} == wanted
    for node in nodes:
        node.decorator_list = []  # they register the function and return it unchanged
    space: dict[str, Any] = {}
    exec(compile(ast.Module(nodes, []), str(path), "exec"), space)
    found: Theirs = space["anls"]
    return found


@pytest.mark.parametrize(
    ("answers", "read"),
    [
        (["0.28"], "0.28"),
        (["0.28", "28%"], "28 %"),
        (["University of California", "UC"], "university  of california."),
        (["ITC Limited"], " itc limited "),
        (["ab"], "ac"),  # exactly at the threshold: kept
        (["abc"], "axy"),  # below it
        (["Yes"], ""),
        ([""], ""),
        (["Straße 5"], "STRASSE 5"),
        (["\ufb01n"], "fin"),
        (["\u0130stanbul"], "istanbul"),
        (["1\u00a0000", "1000"], "1 000"),
    ],
)
def test_cases(theirs: Theirs, answers: list[str], read: str) -> None:
    assert anls(answers, read) == theirs(answers, [read])["anls"]


TEXT = st.text(st.characters(codec="utf-8"), max_size=14) | st.text("aAbB \tß\u0130\ufb01", max_size=8)


@given(st.lists(TEXT, min_size=1, max_size=4), TEXT)
def test_any_strings(theirs: Theirs, answers: list[str], read: str) -> None:
    assert anls(answers, read) == theirs(answers, [read])["anls"]
