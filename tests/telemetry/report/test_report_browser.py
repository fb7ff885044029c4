"""The page in a real Chromium: clicks, keys, hover, both themes, a phone, hostile text. Nothing may leave it."""

import json
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright
from report_runs import HOSTILE, metrics, sample, summary, write_run

from dppo_cli.telemetry.report.run_page import run_page
from dppo_cli.telemetry.report.serve import Pages, make_server
from dppo_cli.telemetry.report.sweep_page import sweep_page
from dppo_cli.training.lock import hold

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = ("no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking")
FLAGS += ("disable-component-update", "disable-sync")

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on the PATH; apt-get install chromium"),
]
Open = Callable[..., Page]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=[f"--{flag}" for flag in FLAGS])
        yield chromium
        chromium.close()


@pytest.fixture
def open_page(browser: Browser, tmp_path: Path) -> Iterator[Open]:
    """`open_page(html)` or `open_page(url=...)`. Fails if a page logged an error, or asked another place for any."""
    pages: list[Page] = []
    trouble: list[str] = []

    def show(html: str = "", url: str | None = None, width: int = 1280, **context: Any) -> Page:
        page = browser.new_page(viewport={"width": width, "height": 900}, **context)
        if url is None:
            file = tmp_path / f"page-{len(pages)}.html"
            file.write_text(html, encoding="utf-8")
            url = file.as_uri()
        allowed = (url, tmp_path.as_uri(), "data:", "blob:")
        page.on("console", lambda message: trouble.append(message.text) if message.type != "log" else None)
        page.on("pageerror", lambda error: trouble.append(str(error)))
        page.on("request", lambda r: None if r.url.startswith(allowed) else trouble.append(f"asked for {r.url}"))
        page.goto(url)
        pages.append(page)
        return page

    yield show
    for page in pages:
        page.close()
    assert trouble == []


@pytest.fixture(scope="module")
def html(tmp_path_factory: pytest.TempPathFactory) -> str:
    rows = [
        sample(list("seventeen")),
        sample(["the ", "answer"], problem=8, sample=1, score=0.0, advantage=-0.5, token_ids=[50, 51]),
    ]
    late = [sample(["late"], problem=9)]
    run = write_run(tmp_path_factory.mktemp("html") / "run", 12, {1: rows, 12: late}, summary(12))
    return run_page(run)


def colour(page: Page, selector: str, name: str = "backgroundColor") -> str:
    found = page.evaluate(f"s => getComputedStyle(document.querySelector(s)).{name}", selector)
    return str(found)


def test_the_first_screen_and_the_curves(open_page: Open, html: str) -> None:
    page = open_page(html)
    expect(page.get_by_role("heading", level=1)).to_have_text("run")
    expect(page.get_by_text("Yes: +50.0 points")).to_be_in_viewport()
    for place in page.locator(".curves").all():
        place.scroll_into_view_if_needed()
        expect(place.locator(".main-svg").first).to_be_visible()
    page.locator("#figure-reward summary").click()
    expect(page.locator("#figure-reward .values td")).to_have_text(["0.3417", "0.8", "0.3417", "0.8"])


def test_hovering_over_a_curve_shows_its_numbers(open_page: Open, html: str) -> None:
    page = open_page(html)
    plot = page.locator("#figure-reward .nsewdrag")
    plot.scroll_into_view_if_needed()
    box = plot.bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + box["width"] - 3, box["y"] + 20)
    expect(page.locator("#figure-reward .hoverlayer")).to_contain_text("0.800")


def test_tokens_that_the_filter_dropped_or_that_a_reply_has(open_page: Open, tmp_path: Path) -> None:
    row = sample(["1", "2", "3"], sampled=[True, True, False], keep=[True, False, None], filtered=[True, False, None])
    page = open_page(run_page(write_run(tmp_path / "run", 3, {1: [row]}, summary(3))))
    tokens = page.locator(".tokens .tok").all()
    assert [token.get_attribute("class") for token in tokens] == ["tok filtered", "tok masked", "tok unsampled"]
    expect(page.locator("#tokens-label")).to_have_text("Completion, 3 tokens, 1 of them by the environment, in italics")
    tokens[0].hover()
    expect(page.get_by_role("complementary", name="Token")).to_contain_text("filtered")
    expect(page.locator(".key")).to_contain_text("filtered: no gradient")


def test_samples_by_mouse(open_page: Open, html: str) -> None:
    page = open_page(html)
    expect(page.locator(".tokens .tok")).to_have_text(["late"])
    page.get_by_label("Step", exact=True).select_option(label="1 (2 samples)")
    tokens = page.locator(".tokens .tok")
    expect(tokens).to_have_text(list("seventeen"))
    expect(page.locator(".tokens .tok.masked")).to_have_count(5)
    tokens.nth(8).hover()
    detail = page.get_by_role("complementary", name="Token")
    expect(detail).to_contain_text("9 of 9")
    expect(detail).to_contain_text("0.3679")  # mu = exp(-1)
    expect(detail).to_contain_text("0.3 (δ 0.15)")
    expect(detail).to_contain_text("masked")
    # The likeliest under mu: the token itself, one of this completion, one that nobody sampled.
    expect(detail.locator("tbody tr td:first-child")).to_have_text(["n", "s", "#99"])
    page.get_by_role("button", name="Problem 8, sample 1").click()
    expect(tokens).to_have_text(["the ", "answer"])
    expect(page.locator(".about")).to_contain_text("advantage -0.5")
    page.get_by_label("Order", exact=True).select_option("low")
    expect(page.locator(".list button").first).to_contain_text("Problem 8, sample 1")
    expect(page.locator(".list button").first).to_contain_text("the answer")


def test_colours_say_what_the_legend_says(open_page: Open, html: str) -> None:
    page = open_page(html)
    page.get_by_role("button", name="Step before").click()
    tokens, legend = page.locator(".tokens .tok"), page.locator(".key")
    expect(tokens).to_have_count(9)

    def looks() -> list[str]:
        found = page.evaluate(
            "() => [...document.querySelectorAll('.tokens > .tok')].map(t => "
            "t.style.getPropertyValue('--hue') + t.style.getPropertyValue('--level'))"
        )
        return list(found)

    expect(legend).to_contain_text("Divergence of pi from mu:")
    expect(legend).to_contain_text("above 2δ = 0.3")
    divergence = [0.3 * (i + 1) / 9 for i in range(9)]
    levels = [sum(d >= e - 1e-9 for e in (0.015, 0.075, 0.15, 0.3)) for d in divergence]
    assert looks() == [f"var(--divergence){level}" for level in levels]
    page.get_by_role("button", name="ratio").click()
    expect(legend).to_contain_text("Ratio pi / mu:")
    # It is 1 + divergence: 1.03, 1.07, ... 1.3.
    assert looks() == [f"var(--above){level}" for level in (0, 1, 1, 1, 1, 1, 2, 2, 2)]
    page.get_by_role("button", name="advantage").click()
    assert looks() == ["var(--positive)3"] * 9
    expect(page.get_by_role("button", name="advantage")).to_have_attribute("aria-pressed", "true")


def test_samples_by_keyboard(open_page: Open, html: str) -> None:
    page = open_page(html)
    page.get_by_role("button", name="Step before").focus()
    page.keyboard.press("Enter")
    tokens = page.locator(".tokens .tok")
    expect(tokens).to_have_count(9)
    page.get_by_role("region", name="Prompt").focus()
    page.keyboard.press("Tab")  # one stop for all tokens
    expect(tokens.nth(0)).to_be_focused()
    page.keyboard.press("ArrowRight")
    expect(tokens.nth(1)).to_be_focused()
    expect(page.get_by_role("complementary", name="Token")).to_contain_text("2 of 9")
    page.keyboard.press("m")
    expect(tokens.nth(4)).to_be_focused()
    expect(tokens.nth(4)).to_have_attribute("aria-label", "n, masked")
    page.keyboard.press("End")
    expect(tokens.nth(8)).to_be_focused()
    page.keyboard.press("m")  # around to the first
    expect(tokens.nth(4)).to_be_focused()
    page.keyboard.press("Home")
    expect(tokens.nth(0)).to_be_focused()
    assert page.locator('.tokens .tok[tabindex="0"]').count() == 1


def test_hostile_text_is_shown_as_text(open_page: Open, tmp_path: Path) -> None:
    evil = "<img src=x onerror=\"document.title='owned'\">"
    row = sample(HOSTILE, prompt=evil, answer=evil, note=evil, status=evil, parts={evil: 1.0})
    warned = summary(12, warnings=[f"step 3: {evil}"])
    page = open_page(run_page(write_run(tmp_path / f"run{evil.replace('/', '')}", samples={1: [row]}, done=warned)))
    tokens = page.locator(".tokens > .tok")
    expect(tokens).to_have_count(len(HOSTILE))
    texts = page.evaluate("() => [...document.querySelectorAll('.tokens > .tok')].map(t => t.textContent)")
    assert texts[0] == HOSTILE[0] and texts[1] == HOSTILE[1]
    assert texts[2] == "\\u202eright to left" and texts[3:5] == ["مرحبا", "👩‍🚀"]
    assert texts[5:] == ["\\u0000\\u001b[31m", "↵\n", "\\ud83d", "\\u2028", "∅"]
    for i in range(len(HOSTILE)):
        tokens.nth(i).hover()
    assert "owned" not in page.title().replace("document.title='owned'", "")
    assert page.locator("main img").count() == 0 and page.locator(".tokens script").count() == 0
    expect(page.locator(".prompt")).to_have_text(evil)


def test_a_hundred_thousand_tokens(open_page: Open, tmp_path: Path) -> None:
    """They are shown in parts, so that the page stays quick."""
    row = sample([f"w{i} " for i in range(100_000)])
    page = open_page(run_page(write_run(tmp_path / "run", samples={1: [row]})))
    tokens = page.locator(".tokens .tok")
    expect(tokens).to_have_count(2000)
    page.get_by_role("button", name="Tokens after").click()
    expect(tokens.first).to_have_text("w2000 ")
    expect(page.locator(".pager")).to_contain_text("Tokens 2001 to 4000 of 100000")
    page.get_by_role("button", name="Tokens before").click()
    expect(page.get_by_role("button", name="Tokens before")).to_be_disabled()


@pytest.mark.parametrize(("scheme", "other"), [("light", "dark"), ("dark", "light")])
def test_the_theme_is_that_of_the_system_until_it_is_switched(
    open_page: Open, html: str, scheme: str, other: str
) -> None:
    shades = {"light": "rgb(246, 247, 249)", "dark": "rgb(17, 20, 24)"}
    page = open_page(html, color_scheme=scheme)
    assert colour(page, "body") == shades[scheme]
    curve = "#figure-accuracy .scatterlayer .trace:last-child path.js-line"
    page.wait_for_selector(curve, state="attached")
    first = colour(page, curve, "stroke")
    page.get_by_role("button", name=f"Switch to {other} colours").click()
    assert colour(page, "body") == shades[other]
    assert colour(page, curve, "stroke") != first
    expect(page.get_by_role("button", name=f"Switch to {scheme} colours")).to_be_visible()


@pytest.mark.parametrize("width", [360, 768])
def test_nothing_is_wider_than_a_phone(open_page: Open, html: str, width: int) -> None:
    page = open_page(html, width=width)
    page.wait_for_selector(".tokens .tok")
    assert page.evaluate("document.scrollingElement.scrollWidth") <= width
    page.locator(".tokens .tok").first.click()
    expect(page.get_by_role("complementary", name="Token")).to_contain_text("1 of 1")


def test_names_and_landmarks(open_page: Open, html: str) -> None:
    page = open_page(html)
    page.wait_for_selector(".tokens .tok")
    assert [page.locator(tag).count() for tag in ("h1", "header", "main", "footer", "nav")] == [1] * 5
    unnamed = "() => [...document.querySelectorAll('button, select, [role=region], [role=img]')].filter(e => " + (
        "!(e.ariaLabel || e.getAttribute('aria-labelledby') || e.textContent.trim() || e.labels?.length))"
    )
    assert page.evaluate(f"({unnamed})().length") == 0
    sections = page.locator("main > section[aria-labelledby]")
    for section in sections.all():
        name = section.get_attribute("aria-labelledby")
        assert page.locator(f"h2#{name}").count() == 1 and page.locator(f'nav a[href="#{name}"]').count() == 1


def test_a_thousand_steps_open_in_less_than_two_seconds(open_page: Open, tmp_path: Path) -> None:
    """Of the processor's time, which depends little on what else the machine does."""
    rows = [sample(["token "] * 200, sample=i) for i in range(32)]
    run = write_run(tmp_path / "run", 1000, dict.fromkeys(range(50, 1001, 50), rows), summary(1000))
    file = tmp_path / "long.html"
    file.write_text(run_page(run), encoding="utf-8")
    page = open_page("<!doctype html><title>empty</title>")
    session = page.context.new_cdp_session(page)
    session.send("Performance.enable", {"timeDomain": "threadTicks"})
    page.goto(file.as_uri())
    page.wait_for_selector(".tokens .tok")
    found = {entry["name"]: entry["value"] for entry in session.send("Performance.getMetrics")["metrics"]}
    assert 0.05 < found["TaskDuration"] < 2


def test_a_page_that_is_served_follows_the_run(open_page: Open, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", 3)
    server = make_server(Pages(run, lambda served: run_page(run, served), 1.0), 0)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    lock = hold(run)
    try:
        page = open_page(url=f"http://127.0.0.1:{server.server_address[1]}/")
        expect(page.get_by_text("running: 3 of 3 steps so far")).to_be_visible()
        with (run / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(metrics(4, 4)) + "\n")
        expect(page.get_by_text("running: 4 of 3 steps so far")).to_be_visible(timeout=20_000)
        (run / "warnings.jsonl").write_text('{"warning": "step 4: odd"}\n')
        expect(page.get_by_text("Step 4: odd")).to_be_visible(timeout=20_000)
        lock.close()  # It was killed: no file changes.
        expect(page.get_by_text("not finished, and not running: 4 of 3 steps")).to_be_visible(timeout=20_000)
    finally:
        lock.close()
        server.shutdown()
        thread.join()
        server.server_close()


def test_a_sweep(open_page: Open, tmp_path: Path) -> None:
    for i, lr in enumerate((0.001, 0.0001)):
        write_run(tmp_path / f"sweep/{i}", 6, done=summary(6), overrides=[f"optim.lr={lr}"])
    page = open_page(sweep_page(tmp_path / "sweep"))
    place = page.locator("#figure-coordinates .curves")
    place.scroll_into_view_if_needed()
    expect(place.locator(".scatterlayer .trace")).to_have_count(2)
    expect(page.get_by_role("region", name="Held-out accuracy")).to_contain_text("0.0001")
