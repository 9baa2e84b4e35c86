"""`echolab view` in a browser: by mouse, by keyboard, over many pages, and on a store that grows. `make test-slow`."""

from __future__ import annotations

import re
import signal
from pathlib import Path

import pytest
from generators import served, told

import echolab

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
DATA = Path(__file__).resolve().parents[1].parent / "shared" / "data"
PHONE = {"width": 390, "height": 844}
DRAWN = ".chart[data-drawn]"
REFUSED = "Failed to load resource: the server responded with a status of 400 (Bad Request)"


@pytest.fixture(scope="module")
def serve():
    pytest.importorskip("starlette", reason="the viewer needs more: pip install 'echolab[view]'")
    running = []

    def serve(root, *options):
        process, url = served.start(root, *options)
        running.append(process)
        return url

    yield serve
    for process in running:
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130


@pytest.fixture(scope="module")
def url(serve, make_store, add_reading):
    store = make_store(told.steps(40))
    add_reading(store, told.experts())
    told.score(store)
    with echolab.open(store.root) as lab:
        lab.profile("golden", "role = 'expert' AND success", bootstrap=20)
        lab.mine("hard")
    return serve(store.root)


def opened(page):
    return page.evaluate("document.querySelector('.groups [aria-current]')?.dataset.group")


def groups(page):
    return page.evaluate("[...document.querySelectorAll('.groups a')].map((a) => a.dataset.group)")


def shows(page, status):
    page.wait_for_function("(said) => document.querySelector('.status').textContent === said", arg=status)


def texts(page):
    found = page.evaluate(
        "[...document.querySelectorAll('.rollout')].map((r) => [r.dataset.rollout, r.querySelector('.text').textContent])"
    )
    return dict(found)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_chart_is_drawn_and_the_first_group_is_open(visit, url, scheme):
    page = visit(url, ready=DRAWN, color_scheme=scheme)
    page.wait_for_function(
        "() => document.querySelectorAll('.chart').length === document.querySelectorAll('.chart[data-drawn] svg').length"
    )
    assert page.locator(DRAWN).count() == 10
    assert page.inner_text("h1").endswith("of the groups taught nothing; they cost 20\u202fk tokens.")
    assert "643 rollouts in 163 groups" in page.inner_text(".kicker")
    assert opened(page) == groups(page)[0] and page.locator(".rollout .text i").count() > 20
    page.click("#theme")
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert paper == ("rgb(20, 23, 26)" if scheme == "light" else "rgb(255, 255, 255)")


def test_filters_conditions_and_pages_by_mouse(visit, url):
    page = visit(url, expected=(REFUSED,))
    shows(page, "163 groups")
    assert page.inner_text(".pager span") == "of 4" and len(groups(page)) == 50
    page.click("[title^='next page']")
    page.wait_for_function("() => document.querySelector('.pager input').value === '2'")
    page.fill(".pager input", "4")
    page.keyboard.press("Enter")
    page.wait_for_function("() => document.querySelectorAll('.groups a').length === 13")
    page.select_option("select[aria-label='all kinds']", "mixed")
    shows(page, "20 of 163 groups")
    assert not page.is_visible(".pager")
    page.fill(".where", "n_success = 1")
    page.keyboard.press("Enter")
    shows(page, "1 of 163 groups")
    page.fill(".where", "n_succes = 1")
    page.keyboard.press("Enter")
    page.wait_for_selector(".status.wrong")
    assert "n_succes" in page.inner_text(".status") and len(groups(page)) == 1
    page.fill(".where", "")
    page.keyboard.press("Enter")
    shows(page, "20 of 163 groups")
    page.select_option("select[aria-label='all kinds']", "")
    page.select_option("select[aria-label='all runs']", "gold")
    shows(page, "3 of 163 groups")
    page.select_option("select[aria-label='all runs']", "r")
    page.select_option("select[aria-label='sorted by']", "oldest")
    page.wait_for_function("() => document.querySelector('.groups a').textContent.includes('step 1 ')")
    page.click("text=all groups of this problem")
    shows(page, "40 of 163 groups")
    assert page.input_value(".where").startswith("problem_id = '")


def test_a_search_reads_all_texts_and_marks_what_it_found(visit, url):
    page = visit(url)
    page.fill("input[type=search]", "answer is 14")
    page.keyboard.press("Enter")
    page.wait_for_selector("mark.shown")
    shows(page, "41 of 163 groups")
    assert "".join(page.locator("mark.shown").all_inner_texts()) == "answer is 14"
    page.fill("input[type=search]", "")
    shows(page, "163 groups")


def test_keys_lead_over_the_end_of_a_page(visit, url):
    page = visit(url)
    page.evaluate("document.getElementById('read').scrollIntoView()")
    first = groups(page)
    page.keyboard.press("j")
    page.wait_for_function("(id) => document.querySelector('[aria-current]').dataset.group === id", arg=first[1])
    page.click(f".groups a[data-group='{first[-1]}']")
    page.wait_for_function("(id) => document.querySelector('[aria-current]').dataset.group === id", arg=first[-1])
    page.keyboard.press("j")
    page.wait_for_function("() => document.querySelector('.pager input').value === '2'")
    page.wait_for_function("() => document.querySelector('.groups a').hasAttribute('aria-current')")
    page.keyboard.press("k")
    page.wait_for_function("(id) => document.querySelector('[aria-current]')?.dataset.group === id", arg=first[-1])
    page.keyboard.press("]")
    page.wait_for_function("() => document.querySelector('.pager input').value === '2'")
    page.keyboard.press("?")
    assert "page of groups" in page.inner_text("dialog[open]")


def test_an_address_leads_back_to_a_rollout_on_any_page(visit, url):
    page = visit(url)
    first = groups(page)[0]
    page.fill(".pager input", "3")
    page.keyboard.press("Enter")
    page.wait_for_function("(id) => document.querySelector('.groups a').dataset.group !== id", arg=first)
    wanted = groups(page)[7]
    page.click(f".groups a[data-group='{wanted}']")
    page.click(".rollout:last-child .text")
    page.wait_for_function("(id) => location.hash.startsWith(`#g/${id}/`)", arg=wanted)
    address, last = page.evaluate("location.hash"), page.evaluate("document.querySelector('.rollout.current').dataset.rollout")
    again = visit(url, fragment=address)
    again.wait_for_function("(id) => document.querySelector('.rollout.current')?.dataset.rollout === id", arg=last)
    missing = visit(url, fragment=f"#g/{'0' * 32}", expected=(REFUSED,))
    missing.wait_for_selector(".group > .absent")
    assert "no group" in missing.inner_text(".group > .absent")


def test_a_cell_of_the_heat_map_opens_its_group(visit, url):
    page = visit(url, ready=DRAWN)
    page.wait_for_function(
        "() => document.querySelectorAll('.chart').length === document.querySelectorAll('.chart[data-drawn]').length"
    )
    cell = page.locator("figure:has([data-sort]) .mark-rect path").nth(7)
    cell.scroll_into_view_if_needed()
    box = cell.bounding_box()
    page.mouse.click(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.wait_for_function("() => location.hash.startsWith('#g/')")
    page.wait_for_function("() => document.querySelector('.about .facts').textContent.includes('step 8 ')")


def test_hostile_rollouts_are_shown_intact_and_do_nothing(visit, serve, make_store):
    rows = [
        {"group": name, "problem": text, "completion": text, "ground_truth": text, "model": text, "sample": n}
        for name, text in told.HOSTILE.items() for n in range(2)
    ]  # fmt: skip
    store = make_store(rows)
    told.score(store, where="sample = 0")
    page = visit(serve(store.root), ready=DRAWN)
    with echolab.open(store.root) as lab:
        stored = dict(lab.sql("SELECT rollout_id, completion FROM rollouts").rows())
    for id in groups(page):
        page.click(f".groups a[data-group='{id}']")
        page.wait_for_function("(id) => location.hash.startsWith(`#g/${id}/`)", arg=id)
        shown = texts(page)
        assert len(shown) == 2 and all(stored[rollout] == text for rollout, text in shown.items())
    assert page.locator("img").count() == 0


def test_two_hundred_thousand_tokens_come_when_they_are_asked_for(visit, serve, make_store):
    long = "".join(f"{i:05d}\n" for i in range(100_000))
    store = make_store([{"problem": "p", "completion": long if n == 3 else "no", "sample": n} for n in range(20)])
    told.score(store)
    page = visit(serve(store.root))
    assert page.locator(".rollout").count() == 16
    cut = page.locator(".rollout:has(footer)")
    shown = len(cut.locator(".text").evaluate("(e) => e.textContent"))
    assert cut.locator("footer").inner_text().startswith("1") and 10_000 < shown < len(long)
    cut.locator("footer button").click()
    page.wait_for_function(
        "(n) => [...document.querySelectorAll('.text')].some((t) => t.textContent.length === n)", arg=len(long)
    )
    assert long in texts(page).values() and page.locator(".text i").count() < 20_000
    page.click("text=all 20 rollouts")
    page.wait_for_function("() => document.querySelectorAll('.rollout').length === 20")


def test_a_store_that_grows_says_so_and_shows_more_when_it_is_asked(visit, serve, make_store, add_reading):
    store, rows = make_store(), told.steps(12)
    page = visit(serve(store.root))
    page.wait_for_function("() => document.querySelector('h1').textContent.includes('There is no policy rollout here')")
    assert "echolab ingest PATH --run NAME" in page.inner_text(".lead") and not page.is_visible("#read")
    add_reading(store, [row for row in rows if row["step"] < 6])
    page.wait_for_selector(".groups a")  # without a reload
    shows(page, "20 groups")
    page.click(".groups a >> nth=3")
    page.wait_for_function("() => location.hash !== ''")
    before = opened(page)
    add_reading(store, [row for row in rows if row["step"] >= 6])
    told.score(store)
    page.wait_for_selector(".news")
    page.wait_for_function("() => document.querySelector('.news').textContent === '28 more groups: show'")
    assert opened(page) == before and len(groups(page)) == 20  # the reader is not disturbed
    page.wait_for_function("() => document.querySelector('.kicker').textContent.includes('48 groups')")  # the charts follow
    page.wait_for_function("() => document.querySelectorAll('#rest [data-drawn]').length > 5")
    page.wait_for_timeout(1000)
    page.click(".news")
    shows(page, "48 groups")
    assert not page.is_visible(".news") and page.evaluate("location.hash").startswith(f"#g/{before}")
    page.wait_for_selector("[data-mode='surprise']")  # there are entropies now
    away = store.root.with_name("away")
    store.root.rename(away)
    page.wait_for_selector(".trouble:not([hidden])")
    assert "no such folder" in page.inner_text(".trouble")
    away.rename(store.root)
    page.wait_for_selector(".trouble", state="hidden")


def test_stores_that_lack_things_say_what_provides_them(visit, serve, make_store):
    stores = {"one": [{"problem": "p", "completion": "x"}], "unrewarded": [{**row, "reward": None} for row in told.steps(3)]}
    for rows in stores.values():
        page = visit(serve(make_store(rows).root))
        page.wait_for_selector("#missing, .absent")
        assert "echolab verify --verifier math" in page.inner_text("body")
        assert "echolab score --model MODEL" in page.inner_text("#about")
        assert page.locator("[data-mode]").count() == 0 and page.locator(".rollout").count() > 0


def test_on_a_phone_nothing_runs_out_of_the_width(visit, url):
    page = visit(url, ready=DRAWN, viewport=PHONE)
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    boxes = page.evaluate(
        "[...document.querySelectorAll('.rollout')].map((r) => r.getBoundingClientRect()).map((b) => [b.left, b.top])"
    )
    assert len(boxes) >= 4 and len({left for left, _ in boxes}) == 1 and boxes == sorted(boxes, key=lambda box: box[1])


@pytest.mark.skipif(not DATA.is_dir(), reason="../shared/data not found: real-data test skipped")
def test_a_store_of_genuine_rollouts(visit, serve, tmp_path):
    with echolab.open(tmp_path / "store", create=True) as lab:
        lab.ingest([*sorted((DATA / "rollouts").glob("reasoning_gym*.json"))], run="amc23")
        lab.ingest(DATA / "rollouts" / "qwen25math_rm_maj_example_math_100x8.jsonl", run="math")
        lab.ingest(DATA / "experts", run="experts", role="expert")
        stored = dict(lab.sql("SELECT rollout_id, completion FROM rollouts").rows())
        n = lab.sql("SELECT count(*) FROM groups").item()
    page = visit(serve(tmp_path / "store"), ready=DRAWN)
    shows(page, f"{n:,} groups")
    assert re.match("In amc23, 34\u202f% of the groups taught nothing", page.inner_text("h1"))
    page.evaluate("document.getElementById('read').scrollIntoView()")
    for _ in range(60):  # over the end of a page
        before = opened(page)
        page.keyboard.press("j")
        page.wait_for_function(
            "(id) => ![undefined, id].includes(document.querySelector('[aria-current]')?.dataset.group)", arg=before
        )
        shown = texts(page)
        assert shown and all(stored[id].startswith(text) for id, text in shown.items())
    assert page.input_value(".pager input") == "2"
