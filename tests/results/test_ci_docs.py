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

from rice_eval.results.policy import Policy
from rice_eval.results.store import ResultStore, read_records

TEXT = (Path(__file__).parents[2] / "docs" / "ci.md").read_text(encoding="utf-8")
INPUTS = {
    "rice_eval": "file:///no/such/place/rice-eval",
    "encoder": "rgb-moments",
    "baseline": "baseline",
    "options": "-p gram-lda --limit-train 16 --limit-test 12 --no-report --workers 0",
}


def bash_block(name: str) -> str:
    found = re.search(rf"<!-- test: {name} -->\n```bash\n(.*?)```", TEXT, re.DOTALL)
    assert found is not None
    return found[1]


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


@pytest.mark.parametrize(
    "source",
    ["git+https://git.example.com/OWNER/rice-eval@v0.1.0", "file:///opt/rice-eval", "git+file:///opt/rice-eval"],
)
def test_the_templates_install_from_where_they_are_told(tmp_path: Path, source: str) -> None:
    """pip is a script that notes what it was asked for: one requirement, with the extra, at the place named."""
    from packaging.requirements import Requirement

    (tmp_path / "pip").write_text('#!/bin/sh\nprintf "%s\\n" "$@" >> "$NOTES"\n')
    (tmp_path / "pip").chmod(0o755)
    (github,) = [s["run"] for s in block("github")["jobs"]["gate"]["steps"] if s.get("name") == "Install"]
    (gitlab,) = block("gitlab")[".rice-eval-gate"]["before_script"]
    for number, script in enumerate((bash_block("install"), github, gitlab)):
        notes = tmp_path / f"notes-{number}"
        variables = {"RICE_EVAL": source, "NOTES": str(notes), "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
        done = subprocess.run(["bash", "-eo", "pipefail", "-c", script], env=variables, check=False)
        assert done.returncode == 0
        verb, asked = notes.read_text().splitlines()
        assert verb == "install"
        requirement = Requirement(asked)
        assert (requirement.name, requirement.extras, requirement.url) == ("rice-eval", {"demo"}, source)
    assert subprocess.run(
        ["bash", "-c", gitlab], env={**variables, "RICE_EVAL": ""}, capture_output=True, check=False
    ).returncode


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
    moved = next(step["run"] for step in job["steps"] if step.get("name") == "What moved")
    for name, encoders in (("several", ("rgb-moments", "other")), ("alone", ("other",))):
        # Of several encoders the candidate's is asked for; a single one is compared whatever it is called.
        (entry,) = read_records([folder / "baseline"])
        for encoder in encoders:
            record = entry.record.model_copy(
                update={"encoder": entry.record.encoder.model_copy(update={"name": encoder})}
            )
            ResultStore(folder / name).save(record, entry.statistics())
        done = bash(moved, folder, {**variables, "BASELINE": name})
        assert done.returncode == 0, done.stderr
        assert ("rgb-moments against other" in done.stdout) == (name == "alone"), done.stdout


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
