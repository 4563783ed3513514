"""The commands of docs/ci.md, run as the services would run them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest
import yaml

from rice_eval.results.gate import Policy

TEXT = (Path(__file__).parents[2] / "docs" / "ci.md").read_text(encoding="utf-8")
INPUTS = {
    "encoder": "rgb-moments",
    "baseline": "baseline",
    "options": "-p gram-lda --limit-train 16 --limit-test 12 --no-report --workers 0",
}


def block(name: str) -> Any:
    found = re.search(rf"<!-- test: {name} -->\n```yaml\n(.*?)```", TEXT, re.DOTALL)
    assert found is not None
    return yaml.safe_load(found[1])


def bash(script: str, folder: Path, variables: dict[str, str]) -> subprocess.CompletedProcess[str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, **variables, "PATH": path, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        ["bash", "-eo", "pipefail", "-c", script],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("ci")
    (root / "gate.yaml").write_text("margin: 0.3\n")
    done = bash(
        f"rice-eval run -e rgb-moments -t segmentation/scenes --results baseline --bank bank {INPUTS['options']}",
        root,
        {},
    )
    assert done.returncode == 0, done.stderr
    return root


def test_github(folder: Path) -> None:
    workflow = block("github")
    inputs = workflow[True]["workflow_call"]["inputs"]  # YAML 1.1 reads the key "on" as true
    values = {name: str(INPUTS.get(name, spec.get("default", ""))) for name, spec in inputs.items()}
    job = workflow["jobs"]["gate"]
    variables = {
        name: re.sub(r"\$\{\{ inputs\.(\w+) \}\}", lambda m: values[m[1]], text) for name, text in job["env"].items()
    }
    variables["GITHUB_STEP_SUMMARY"] = str(folder / "step.md")
    ran = []
    for step in job["steps"]:
        if "run" in step and step["name"] != "Install":
            done = bash(step["run"], folder, variables)
            assert done.returncode == 0, (step["name"], done.stdout, done.stderr)
            ran.append(step["name"])
    assert ran == ["Evaluate", "Gate", "What moved"]
    assert "rice-eval gate: passed" in (folder / "step.md").read_text()
    assert ElementTree.parse(folder / "gate.xml").getroot().get("failures") == "0"
    assert json.loads((folder / "gate.json").read_text())["counts"]["pass"] == 1
    assert list((folder / "moved").glob("*.png"))


def test_gitlab(folder: Path) -> None:
    job = block("gitlab")[".rice-eval-gate"]
    variables = {**job["variables"], "ENCODER": INPUTS["encoder"], "OPTIONS": INPUTS["options"]}
    done = bash("\n".join(job["script"]), folder, variables)
    assert done.returncode == 0, (done.stdout, done.stderr)
    for name in [*job["artifacts"]["paths"], job["artifacts"]["reports"]["junit"]]:
        assert (folder / name).exists(), name


def test_a_missing_baseline_stops_the_job_with_2(folder: Path) -> None:
    done = bash("rice-eval gate --baseline nowhere --candidate baseline", folder, {})
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1


def test_the_policy_shown_is_the_default() -> None:
    shown = next(re.finditer(r"```yaml\n(# gate\.yaml.*?)```", TEXT, re.DOTALL))[1]
    policy = Policy.model_validate(yaml.safe_load(shown))
    assert policy.model_copy(update={"tasks": {}}) == Policy()
    assert policy.of("segmentation/scenes").margin == 0.3
