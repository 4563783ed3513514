"""The figure of ``simulation.py`` as SVG, written by hand: matplotlib is no dependency."""

from __future__ import annotations

from typing import Any

from rice_eval.results.bootstrap import KIND

_COLOURS = {KIND: "#1f6feb", "percentile": "#d29922", "basic": "#8957e5", "bca": "#da3633"}


def plot(found: dict[str, Any]) -> str:
    """Coverage by method, and what the gate fails, as one SVG."""
    cover: dict[str, dict[str, dict[str, float]]] = {name: part["methods"] for name, part in found["coverage"].items()}
    gates: list[dict[str, Any]] = found["gate"]
    out = [
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 900 380" font-family="sans-serif" font-size="12">',
        '<rect width="900" height="380" fill="white"/>',
        '<text x="60" y="22" font-size="14">Coverage of nominal 95 % intervals, 200 images</text>',
        '<text x="540" y="22" font-size="14">Gate: share of pairs that fail</text>',
    ]

    def y(share: float, low: float) -> float:
        return 300 - 260 * (max(share, low) - low) / (1 - low)

    out.append(
        f'<rect x="60" y="{y(0.97, 0.0):.1f}" width="420" height="{y(0.93, 0.0) - y(0.97, 0.0):.1f}" fill="#d5f0da"/>'
    )
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        out.append(f'<text x="54" y="{y(share, 0.0) + 4:.1f}" text-anchor="end">{share:.0%}</text>')
        out.append(f'<line x1="60" x2="480" y1="{y(share, 0.0):.1f}" y2="{y(share, 0.0):.1f}" stroke="#ddd"/>')
    step = 420 / len(cover)
    for k, (name, methods) in enumerate(cover.items()):
        for j, (method, values) in enumerate(methods.items()):
            x = 60 + step * k + 12 + j * (step - 24) / len(methods)
            top = y(values["coverage"], 0.0)
            width = (step - 24) / len(methods) - 2
            out.append(
                f'<rect x="{x:.1f}" y="{top:.1f}" width="{width:.1f}" height="{300 - top:.1f}" fill="{_COLOURS[method]}">'
                f"<title>{name} {method} {values['coverage']:.1%}</title></rect>"
            )
        out.append(f'<text x="{60 + step * (k + 0.5):.1f}" y="318" text-anchor="middle" font-size="10">{name}</text>')
    for j, (method, colour) in enumerate(_COLOURS.items()):
        label = "rice-eval" if method == KIND else method
        out.append(f'<rect x="{60 + 100 * j}" y="340" width="10" height="10" fill="{colour}"/>')
        out.append(f'<text x="{75 + 100 * j}" y="350">{label}</text>')
    for share in (0.05, 0.5, 0.9, 1.0):
        out.append(f'<text x="534" y="{y(share, 0.0) + 4:.1f}" text-anchor="end">{share:.0%}</text>')
        out.append(f'<line x1="540" x2="870" y1="{y(share, 0.0):.1f}" y2="{y(share, 0.0):.1f}" stroke="#ddd"/>')
    for gate, colour in zip(gates, ("#1f6feb", "#da3633", "#8957e5")):
        failed: dict[str, float] = gate["failed"]
        points = [(540 + 160 * float(x), y(v, 0.0)) for x, v in failed.items()]
        out.append(
            f'<polyline fill="none" stroke="{colour}" stroke-width="2" points="{" ".join(f"{a:.1f},{b:.1f}" for a, b in points)}"/>'
        )
        out += [f'<circle cx="{a:.1f}" cy="{b:.1f}" r="3.5" fill="{colour}"/>' for a, b in points]
    for multiple in (0, 0.5, 1, 1.5, 2):
        out.append(f'<text x="{540 + 160 * multiple:.1f}" y="318" text-anchor="middle">{multiple:g}x</text>')
    out.append('<text x="700" y="336" text-anchor="middle">true drop, in smallest detectable drops</text>')
    for k, (gate, colour) in enumerate(zip(gates, ("#1f6feb", "#da3633", "#8957e5"))):
        out.append(
            f'<text x="540" y="{354 + 14 * k}" fill="{colour}">{gate["tasks"]} task(s), margin {gate["margin"]:g}</text>'
        )
    return "\n".join([*out, "</svg>", ""])
