"""The gate's report for machines and people: JSON, JUnit XML, Markdown."""

from __future__ import annotations

import json
import math
import re
import xml.etree.ElementTree as ElementTree

from rice_eval.results.gate import GateReport, TaskVerdict
from rice_eval.results.tables import escape_markdown, number

__all__ = ["detectable_text", "gate_json", "gate_junit", "gate_markdown"]

_NOT_XML = re.compile("[^\t\n\r -\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""What XML 1.0 has no way to hold, section 2.2."""

_WORDS = {0: "passed", 1: "regression", 2: "unusable"}
_MARKS = {"pass": "✅ pass", "warn": "⚠️ warn", "fail": "❌ fail", "unusable": "🚫 unusable"}


def gate_json(report: GateReport) -> str:
    """``exit_code``, counts, the policy and every verdict."""
    content = {
        "exit_code": report.exit_code,
        "result": _WORDS[report.exit_code],
        "counts": {s: report.count(s) for s in ("pass", "warn", "fail", "unusable")},
        "policy": report.policy.model_dump(mode="json"),
        "problem": report.problem or None,
        "warnings": list(report.warnings),
        "verdicts": [v.plain() for v in report.verdicts],
    }
    return json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _xml(text: str) -> str:
    return _NOT_XML.sub("\ufffd", text)


def gate_junit(report: GateReport) -> str:
    """JUnit XML: a test case a task; ``fail`` is a failure, ``unusable`` (and a problem) an error, ``warn`` passes with its words as
    output."""
    totals = {
        "tests": str(len(report.verdicts) + (report.problem != "")),
        "failures": str(report.count("fail")),
        "errors": str(report.count("unusable")),
        "skipped": "0",
        "time": "0",
    }
    root = ElementTree.Element("testsuites", {"name": "rice-eval gate", **totals})
    suite = ElementTree.SubElement(root, "testsuite", {"name": "rice-eval gate", **totals})
    for verdict in report.verdicts:
        case = ElementTree.SubElement(
            suite,
            "testcase",
            {"classname": _xml(f"rice-eval.{verdict.encoder}"), "name": _xml(verdict.pair.name), "time": "0"},
        )
        words = _xml(verdict.reason)
        if verdict.status == "fail":
            ElementTree.SubElement(case, "failure", {"message": words, "type": "regression"}).text = _xml(
                _numbers(verdict)
            )
        elif verdict.status == "unusable":
            ElementTree.SubElement(case, "error", {"message": words, "type": "unusable"}).text = words
        out = f"{verdict.status}: {verdict.reason}\n{_numbers(verdict)}"
        ElementTree.SubElement(case, "system-out").text = _xml(out)
    if report.problem:
        case = ElementTree.SubElement(
            suite, "testcase", {"classname": "rice-eval", "name": "results can be read", "time": "0"}
        )
        words = _xml(report.problem)
        ElementTree.SubElement(case, "error", {"message": words, "type": "unusable"}).text = words
    if report.warnings:
        ElementTree.SubElement(suite, "system-out").text = _xml("\n".join(report.warnings))
    ElementTree.indent(root)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ElementTree.tostring(root, encoding="unicode") + "\n"


def detectable_text(detectable: float | None, digits: str) -> str:
    """The smallest detectable drop in words; ``none`` where no drop can be significant."""
    return "" if detectable is None else "none" if math.isinf(detectable) else format(detectable, digits)


def _numbers(verdict: TaskVerdict) -> str:
    t = verdict.test
    if t is None:
        return verdict.reason
    return (
        f"baseline {t.a:.4f}, candidate {t.b:.4f}, difference {t.difference:+.4f} [{t.low:+.4f}, {t.high:+.4f}], "
        f"p {t.p_worse:.4g} ({t.test}), adjusted {number(verdict.p_adjusted)}, {t.images} images, margin {verdict.margin:g}, "
        f"smallest detectable drop {detectable_text(verdict.detectable, '.6g')}"
    )


def gate_markdown(report: GateReport) -> str:
    """A summary with a table a verdict; what failed comes first."""
    order = {"fail": 0, "unusable": 1, "warn": 2, "pass": 3}
    lines = [
        f"### rice-eval gate: {_WORDS[report.exit_code]}",
        "",
        ", ".join(f"{report.count(s)} {s}" for s in ("pass", "warn", "fail", "unusable")) + ".",
        "",
    ]
    for text in (*report.warnings, *([report.problem] if report.problem else [])):
        lines += [escape_markdown(text), ""]
    if not report.verdicts:
        return "\n".join(lines)
    lines += [
        "| result | encoder | task | baseline | candidate | difference, 95 % interval | p | detectable | why |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for v in sorted(report.verdicts, key=lambda v: order[v.status]):
        t = v.test
        numbers = ["", "", "", "", ""]
        if t is not None:
            numbers = [
                f"{t.a:.2f}",
                f"{t.b:.2f}",
                f"{t.difference:+.2f} [{t.low:+.2f}, {t.high:+.2f}]",
                f"{v.p_adjusted:.3g}",
                detectable_text(v.detectable, ".2f"),
            ]
        cells = [
            _MARKS[v.status],
            escape_markdown(v.encoder),
            escape_markdown(v.pair.name),
            *numbers,
            escape_markdown(v.reason),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, ""])
