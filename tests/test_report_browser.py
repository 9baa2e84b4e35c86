"""The report in a browser: what it draws, how it is used, and that nothing leaves it. `make test-slow`."""

from __future__ import annotations

import json
import re
from html import escape
from pathlib import Path

import pytest
from generators import told

import echolab

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
DATA = Path(__file__).resolve().parents[1].parent / "shared" / "data"
PHONE = {"width": 390, "height": 844}


@pytest.fixture(scope="module")
def report(make_store, add_reading, tmp_path_factory):
    store = make_store(told.steps())
    add_reading(store, told.experts())
    told.score(store)
    path = tmp_path_factory.mktemp("page") / "report.html"
    with echolab.open(store.root) as lab:
        lab.profile("golden", "role = 'expert' AND success", bootstrap=20)
        lab.mine("hard")
        lab.report(path)
    return path


CHUNKS = "([id, name]) => [...document.querySelectorAll(`[data-rollout='${id}'] .${name}`)].map((c) => c.textContent).join('')"
COLUMNS = "[...document.querySelectorAll('.rollout')]"
MARKS = "[...document.querySelectorAll('.chart svg')].map((svg) => svg.querySelectorAll('.role-mark path').length)"


def chart_places(page):
    return page.locator(".chart").count()


def opened(page):
    return page.evaluate("document.querySelector('.groups [aria-current]').dataset.group")


def current(page):
    return page.evaluate("document.querySelector('.rollout.current').dataset.rollout")


def groups(page):
    return page.evaluate("[...document.querySelectorAll('.groups a')].map((a) => a.dataset.group)")


def text_of(page, rollout):
    return page.evaluate("(id) => document.querySelector(`[data-rollout='${id}'] .text`).textContent", rollout)


def payloads(path):
    found = re.findall(r'<script type="application/json" id="g-(\w+)">(.*?)</script>', path.read_text(), re.DOTALL)
    return {id: json.loads(text) for id, text in found}


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_chart_is_drawn(visit, report, scheme):
    page = visit(report, color_scheme=scheme)
    assert chart_places(page) == page.locator(".chart[data-drawn] svg").count() == 10
    marks = page.evaluate(
        "[...document.querySelectorAll('.chart svg')].map((svg) => svg.querySelectorAll('.role-mark path').length)"
    )
    assert all(marks)
    inks = page.evaluate("[...document.querySelectorAll('.chart svg text')].map((t) => getComputedStyle(t).fill)")
    assert ("rgb(90, 99, 109)" if scheme == "light" else "rgb(157, 167, 176)") in inks


def test_the_theme_can_be_switched(visit, report):
    page = visit(report, color_scheme="light")
    paper = "getComputedStyle(document.body).backgroundColor"
    assert page.evaluate(paper) == "rgb(255, 255, 255)"
    page.click("#theme")
    assert page.evaluate(paper) == "rgb(20, 23, 26)"
    page.click("#theme")
    assert page.evaluate(paper) == "rgb(255, 255, 255)"


def test_the_reader_by_mouse(visit, report):
    page = visit(report)
    first, second = groups(page)[:2]
    assert opened(page) == first and page.evaluate("location.hash") == ""
    page.click(f".groups a[data-group='{second}']")
    page.wait_for_function("location.hash !== ''")
    assert opened(page) == second and page.evaluate("location.hash").startswith(f"#g/{second}/")
    page.hover(".rollout:nth-child(2) .text i >> nth=3")
    assert re.match(r"token \d+   H \d\.\d\d nats   p ", page.inner_text(".reader .tip"))
    levels = "new Set([...document.querySelectorAll('.rollout .text i')].map((i) => i.className)).size"
    coloured = page.evaluate(levels)
    page.click("button[data-mode='plain']")
    assert coloured > 4 and page.evaluate(levels) == 1
    page.click("button[data-mode='surprise']")
    assert page.evaluate(levels) > 4
    page.select_option("select[aria-label='all kinds']", "mixed")
    page.wait_for_function("document.querySelector('.status').textContent === '6 of 48 groups'")
    page.select_option("select[aria-label='all outcomes']", "right")
    page.wait_for_selector(".rollout:not(.expert) .mark.right")
    assert page.locator(".rollout:not(.expert) .mark.wrong").count() == 0
    page.click("canvas.bars >> nth=0", position={"x": 5, "y": 20})
    assert page.locator(".text .shown").count() == 1


def test_the_reader_by_keyboard(visit, report):
    page = visit(report)
    page.evaluate("document.getElementById('read').scrollIntoView()")
    order = groups(page)
    for key, place in (("j", 1), ("j", 2), ("k", 1)):
        page.keyboard.press(key)
        page.wait_for_function("(id) => document.querySelector('[aria-current]').dataset.group === id", arg=order[place])
    before = current(page)
    page.keyboard.press("l")
    assert current(page) != before
    page.keyboard.press("ArrowLeft")
    assert current(page) == before
    for key, mode in (("s", "surprise"), ("f", "forks"), ("w", "plain"), ("e", "entropy")):
        page.keyboard.press(key)
        assert page.locator(f"[data-mode='{mode}'][aria-pressed='true']").count() == 1
    page.keyboard.press("p")
    assert page.locator(".rollout.current .peak .shown").count() == 1
    page.keyboard.press("?")
    assert page.locator("dialog[open] tr").count() >= 9
    page.keyboard.press("Escape")
    assert page.locator("dialog[open]").count() == 0
    page.keyboard.press("/")
    page.keyboard.type("answer is 14")
    page.keyboard.press("Enter")
    page.wait_for_selector("mark.shown")
    assert "".join(page.locator("mark.shown").all_inner_texts()) == "answer is 14"  # over several tokens
    found = groups(page)
    assert 0 < len(found) < len(order)
    page.keyboard.press("Escape")
    page.wait_for_function("(n) => document.querySelectorAll('.groups a').length === n", arg=len(order))
    assert page.locator("mark").count() == 0


def test_clips_and_peaks_are_marked_where_they_are(visit, report):
    page = visit(report)
    for id, group in list(payloads(report).items())[:12]:
        page.evaluate("(id) => { location.hash = `#g/${id}`; }", id)
        page.wait_for_function("(id) => document.querySelector('[aria-current]').dataset.group === id", arg=id)
        for rollout in group["rollouts"]:
            marked = page.evaluate(CHUNKS, [rollout["id"], "clip"])
            tokens = rollout["text"].encode()[: 3 * rollout.get("clip_end", 0)]
            assert marked == tokens.decode(errors="ignore")
            ends = [0, *rollout["segment_ends"]]
            begin, end = ends[rollout["peak"]], ends[rollout["peak"] + 1]
            peak = page.evaluate(CHUNKS, [rollout["id"], "peak"])
            assert peak == rollout["text"].encode()[3 * begin : 3 * end].decode(errors="ignore")


def test_an_address_leads_back_to_a_rollout(visit, report):
    group = list(payloads(report).values())[-1]
    wanted = group["rollouts"][-1]["id"]
    page = visit(report, fragment=f"#g/{group['group_id']}/{wanted}")
    assert opened(page) == group["group_id"] and current(page) == wanted
    assert page.evaluate("document.getElementById('reader').getBoundingClientRect().top") < 100


def test_a_group_that_is_not_there_is_said_to_be_missing(visit, report):
    page = visit(report, fragment=f"#g/{'0' * 32}")
    assert "is not in this page" in page.inner_text(".group")


def test_a_cell_of_the_heat_map_opens_its_group(visit, report):
    page = visit(report)
    cell = page.locator("figure:has([data-sort]) .mark-rect path").nth(7)
    cell.scroll_into_view_if_needed()
    box = cell.bounding_box()
    page.mouse.move(box["x"] + 9, box["y"] + box["height"] / 2)
    said = page.inner_text("body > .tip")
    page.mouse.down()
    page.mouse.up()
    page.wait_for_function("location.hash.startsWith('#g/')")
    facts = page.inner_text(".about .facts")
    (step,) = re.findall(r"step (\d+)", said)
    assert f"step {step} " in facts


def test_problems_can_be_sorted(visit, report):
    page = visit(report)
    labels = "figure:has([data-sort]) .role-axis-label text"
    names = f'[...document.querySelectorAll("{labels}")].map((t) => t.textContent).slice(-4)'
    page.click("[data-sort^='problem']")
    page.wait_for_function(f"{names}.join('|') === [...{names}].sort().join('|')")
    assert page.locator("[data-sort][aria-pressed='true']").inner_text() == "name"


def test_hostile_rollouts_are_shown_intact_and_do_nothing(visit, make_store, tmp_path):
    texts = [*told.HOSTILE.values(), "plain"]
    rows = []
    for i, text in enumerate(texts):
        known = {"problem": text, "completion": text, "ground_truth": text, "model": text}
        rows += [{"group": f"g{i}", "sample": n, "reward": float(n), **known} for n in range(2)]
    store = make_store(rows)
    told.score(store, where="sample = 0")  # others are shown without tokens
    with echolab.open(store.root) as lab:
        lab.report(tmp_path / "page.html")
    page = visit(tmp_path / "page.html")
    for id, group in payloads(tmp_path / "page.html").items():
        page.evaluate("(id) => { location.hash = `#g/${id}`; }", id)
        page.wait_for_function("(id) => document.querySelector('[aria-current]').dataset.group === id", arg=id)
        page.wait_for_selector(".rollout .text i")
        for rollout in group["rollouts"]:
            assert text_of(page, rollout["id"]) == rollout["text"]
        assert page.locator(".prompt").evaluate("(e) => e.textContent") == group["prompt"]
    assert page.locator("img").count() == 0
    assert sorted({r["text"] for g in payloads(tmp_path / "page.html").values() for r in g["rollouts"]}) == sorted(texts)


def test_characters_that_cannot_be_seen_get_signs(visit, make_store, tmp_path):
    store = make_store([{"problem": "p", "completion": told.HOSTILE["control"], "reward": 1.0}])
    with echolab.open(store.root) as lab:
        lab.report(tmp_path / "page.html")
    page = visit(tmp_path / "page.html")
    names = page.evaluate("[...document.querySelectorAll('.rollout .unseen')].map((b) => b.dataset.name)")
    assert names == ["U+000D", "U+0000", "U+001B", "U+007F", "U+200B"]
    assert page.locator(".rollout .newline").count() == 3 and page.locator(".rollout .tab").count() == 1


def test_two_hundred_thousand_tokens(visit, make_store, tmp_path):
    long = "".join(f"{i:05d}\n" for i in range(100_000))
    texts = {0: long, 1: "no"}
    store = make_store([{"problem": "p", "completion": text, "reward": float(n), "sample": n} for n, text in texts.items()])
    told.score(store)
    with echolab.open(store.root) as lab:
        lab.report(tmp_path / "page.html")
    assert (tmp_path / "page.html").stat().st_size < 5_000_000
    page = visit(tmp_path / "page.html")
    (group,) = payloads(tmp_path / "page.html").values()
    rollout = next(r for r in group["rollouts"] if r["n_tokens"] == 200_000)
    assert text_of(page, rollout["id"]) == long
    assert page.locator(".text i").count() < 20_000  # only what is near the window
    page.evaluate("document.getElementById('read').scrollIntoView()")
    page.locator(f"[data-rollout='{rollout['id']}']").evaluate("(e) => { e.scrollTop = e.scrollHeight; }")
    page.wait_for_selector("[data-t='199999']")
    page.keyboard.press("p")
    assert text_of(page, rollout["id"]) == long


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read_on_every_colour(visit, report, scheme):
    """WCAG AA: a contrast of 4.5, for tokens of every level, for muted words and for links."""
    page = visit(report, color_scheme=scheme)
    pairs = page.evaluate(
        """() => {
          const paper = getComputedStyle(document.body).backgroundColor, text = document.querySelector('.rollout .text');
          const ink = (selector) => [getComputedStyle(document.querySelector(selector)).color, paper];
          const level = (n) => {
            const token = document.createElement('i');
            token.className = `h${n}`;
            text.append(token);
            const { color, backgroundColor } = getComputedStyle(token);
            return [color, backgroundColor];
          };
          const words = ['.kicker', '.rollout .facts', '.about .facts', 'figcaption'];
          return [...[1, 2, 3, 4, 5, 6, 7, 8].map(level), ...words.map(ink)];
        }"""
    )
    for colour, ground in pairs:
        assert contrast(colour, ground) >= 4.5, (colour, ground)


def contrast(a: str, b: str) -> float:
    def luminance(colour: str) -> float:
        channels = [int(c) / 255 for c in re.findall(r"\d+", colour)[:3]]
        red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


def test_a_phone_shows_rollouts_as_a_stack_and_nothing_runs_out_of_its_width(visit, report):
    page = visit(report, viewport=PHONE)
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    boxes = page.evaluate(
        "[...document.querySelectorAll('.rollout')].map((r) => r.getBoundingClientRect()).map((b) => [b.left, b.top])"
    )
    assert len(boxes) >= 4 and len({left for left, _ in boxes}) == 1 and boxes == sorted(boxes, key=lambda box: box[1])


@pytest.mark.parametrize("width", [390, 800, 1300, 1900])
def test_a_page_scrolls_in_one_direction_only(visit, report, width):
    """Where scrollbars take room, as they do here: a page as wide as its window, `100vw`, is too wide then."""
    page = visit(report, viewport={"width": width, "height": 900})
    page.evaluate("window.scrollTo(50, 0)")
    assert page.evaluate("document.documentElement.clientWidth < innerWidth")  # there is a scrollbar for the height
    assert page.evaluate("[scrollX, innerHeight - document.documentElement.clientHeight]") == [0, 0]


def test_on_paper_there_are_charts_tables_and_the_open_group(visit, report):
    page = visit(report, color_scheme="dark")
    page.emulate_media(media="print")
    assert not page.is_visible(".reader .bar") and not page.is_visible(".side") and page.is_visible(".rollout")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert len(page.pdf()) > 50_000


def test_a_cell_of_a_notebook_shows_the_reader(visit, make_store, tmp_path):
    store = make_store(told.steps(2))
    told.score(store)
    with echolab.open(store.root) as lab:
        group = lab.sql("SELECT group_id FROM groups WHERE kind = 'mixed' LIMIT 1").item()
        cell = lab.reader(group)._repr_html_()
    (tmp_path / "notebook.html").write_text(f"<!doctype html><title>{escape('a notebook')}</title><p>In [1]:</p>{cell}")
    page = visit(tmp_path / "notebook.html", ready="iframe")
    frame = page.frame_locator("iframe")
    frame.locator(".rollout .text i").first.wait_for()
    assert frame.locator(".rollout").count() == 4
    frame.locator("[data-mode='surprise']").click()
    frame.locator("[data-mode='surprise'][aria-pressed='true']").wait_for()


def test_pages_of_poor_stores_open_too(visit, make_store, tmp_path):
    stores = {
        "empty": [],
        "one": [{"problem": "p", "completion": "x"}],
        "unrewarded": [{**row, "reward": None} for row in told.steps(3)],
        "filtered": told.steps(3),
    }
    for name, rows in stores.items():
        store = make_store(rows, **({"completeness": "filtered"} if name == "filtered" else {}))
        with echolab.open(store.root) as lab:
            lab.report(tmp_path / f"{name}.html")
        page = visit(tmp_path / f"{name}.html")
        assert page.inner_text("h1")
        assert page.locator(".chart:not([data-drawn])").count() == 0


@pytest.mark.skipif(not DATA.is_dir(), reason="../shared/data not found: real-data test skipped")
def test_the_page_of_genuine_rollouts(visit, tmp_path):
    with echolab.open(tmp_path / "store", create=True) as lab:
        lab.ingest([*sorted((DATA / "rollouts").glob("reasoning_gym*.json"))], run="amc23")
        lab.ingest(DATA / "rollouts" / "qwen25math_rm_maj_example_math_100x8.jsonl", run="math")
        lab.ingest(DATA / "experts", run="experts", role="expert")
        done = lab.report(tmp_path / "page.html")
    assert done.size < 5_000_000
    page = visit(tmp_path / "page.html")
    assert page.inner_text("h1").startswith(
        "In amc23, 34\u202f% of the groups taught nothing; they cost 1.8\u202fM characters."
    )
    assert page.locator(".chart[data-drawn]").count() == chart_places(page)
    page.evaluate("document.getElementById('read').scrollIntoView()")
    for _ in range(10):
        before = opened(page)
        page.keyboard.press("j")
        page.wait_for_function("(id) => document.querySelector('[aria-current]').dataset.group !== id", arg=before)
        shown = page.evaluate(
            "[...document.querySelectorAll('.rollout')].map((r) => [r.dataset.rollout, r.querySelector('.text').textContent])"
        )
        texts = {r["id"]: r["text"] for r in payloads(tmp_path / "page.html")[opened(page)]["rollouts"]}
        assert dict(shown) == texts
