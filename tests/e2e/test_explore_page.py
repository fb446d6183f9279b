"""The page of a library in a real browser: it draws, finds, and is usable by everybody; and over a server it asks."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import CHROMIUM, needs_chromium
from tests.support.explored import make_explored
from tests.support.page_checks import barriers
from tests.support.page_server import MODELS, PIECES, REFUSAL, PageServer, page_server

from lorary.report.explore import render_explored
from lorary.report.shell import write_page

pytestmark = needs_chromium
VIEWS = [(1280, "light"), (1280, "dark"), (390, "light"), (390, "dark")]
# Milliseconds of a search among 1,000 adapters, script and layout together.
MOST_SEARCH_MS = 100

OpenPage = Callable[..., Any]


@pytest.fixture(scope="module")
def tab() -> Iterator[Any]:
    """The one page of a browser, since a new one takes as long as a test."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright drives the browser")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-dev-shm-usage"])
        page = browser.new_page()
        page.set_default_timeout(20_000)
        yield page
        browser.close()


@pytest.fixture
def complaints(tab: Any) -> Iterator[list[str]]:
    """What the console and the scripts say; a test that expects something takes it out."""
    said: list[str] = []
    listeners = {
        "console": lambda message: said.append(message.text),
        "pageerror": lambda error: said.append(str(error)),
    }
    for event, listener in listeners.items():
        tab.on(event, listener)
    yield said
    tab.goto("about:blank")  # a page that is left asks no server any more
    for event, listener in listeners.items():
        tab.remove_listener(event, listener)
    assert said == []


@pytest.fixture
def open_page(tab: Any, complaints: list[str]) -> OpenPage:
    """Open an address as on a screen in the light."""

    def opening(url: str) -> Any:
        tab.set_viewport_size({"width": 1280, "height": 900})
        tab.emulate_media(color_scheme="light")
        tab.goto(url)
        return tab

    return opening


@pytest.fixture(scope="module")
def page_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], str]:
    """Address of the page of a library of so many adapters, written once."""
    folder = tmp_path_factory.mktemp("pages")

    def address(number: int) -> str:
        path: Path = folder / f"{number}.html"
        if not path.exists():
            write_page(path, render_explored(make_explored(number)))
        return path.as_uri()

    return address


@pytest.fixture(scope="module")
def live_page() -> str:
    return render_explored(make_explored(), live=True)


@pytest.fixture
def server(live_page: str) -> Iterator[PageServer]:
    with page_server(live_page) as running:
        yield running


def test_nothing_bars_anybody_from_the_page_of_a_library(open_page: OpenPage, page_of: Callable[[int], str]) -> None:
    page = open_page(page_of(12))
    page.locator("button.name", has_text="facts_0006").first.click()
    page.locator("#card summary").click()
    assert barriers_in_all_views(page) == []


def test_the_keyboard_goes_over_the_map_to_the_card_and_to_a_neighbour(
    open_page: OpenPage, page_of: Callable[[int], str]
) -> None:
    page = open_page(page_of(12))
    page.focus("#plot-map")
    page.keyboard.press("Home")
    assert page.locator("#plot-map").get_attribute("aria-activedescendant") == "spot-0"
    page.keyboard.press("ArrowRight")
    moved = page.locator("#plot-map [aria-selected=true]")
    assert moved.count() == 1
    assert moved.get_attribute("id") != "spot-0"
    assert moved.get_attribute("aria-label").startswith(page.locator("#card h3").inner_text())
    page.keyboard.press("Home")
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "card"
    card = page.locator("#card").inner_text()
    for words in (
        "arithmetic_0000",
        "cluster 0: arithmetic",
        "16",
        "q_proj in 2 layers",
        "1.5 KiB",
        "2026-01-02 03:04",
    ):
        assert words in card
    assert "0.250 (base 2.500)" in card
    assert page.locator("#card td").all_inner_texts()[2:] == ["12.5", "75.0", "20"]
    assert page.locator(".near li").all_inner_texts()[0].split() == ["arithmetic_0004", "0.50"]
    page.locator(".near button").first.click()
    assert page.locator("#card h3").inner_text() == "arithmetic_0004"
    assert page.locator("#adapter-table [aria-current=true] button").inner_text() == "arithmetic_0004"


def test_a_click_on_the_map_chooses_what_is_near_it(open_page: OpenPage, page_of: Callable[[int], str]) -> None:
    page = open_page(page_of(12))
    box = page.locator("#spot-5").bounding_box()
    page.mouse.click(box["x"] + box["width"] / 2 + 3, box["y"] + box["height"] / 2 + 3)
    assert page.locator("#card h3").inner_text() == "dates_0005"
    for key, is_larger in (("#zoom-in", True), ("#zoom-whole", False)):
        page.click(key)
        assert ("zoomed" in page.locator("#plot-map").get_attribute("class")) == is_larger
        assert page.locator("#card h3").inner_text() == "dates_0005"


def test_search_and_filters_act_on_the_map_and_on_the_table(open_page: OpenPage, page_of: Callable[[int], str]) -> None:
    page = open_page(page_of(12))
    shown = page.locator("#adapter-table tbody tr:not([hidden]) th")
    page.fill("#search", "DATES 0")
    assert shown.all_inner_texts() == ["dates_0001", "dates_0005", "dates_0009"]
    assert page.locator("#matches").inner_text() == "3 of 12 adapters"
    assert page.locator("#plot-map .out").count() == 9
    page.select_option("#family", label="facts")
    assert shown.count() == 0
    page.click("#show-all")
    assert shown.count() == 12
    page.locator("#cluster-table button").nth(3).click()
    assert {name[:7] for name in shown.all_inner_texts()} == {"strings"}
    page.click("#show-all")
    heading = page.locator("#adapter-table thead button", has_text="parameters")
    heading.click()
    heading.click()
    assert shown.first.inner_text() == "strings_0011"


def test_1000_adapters_are_searched_at_once(open_page: OpenPage, page_of: Callable[[int], str]) -> None:
    page = open_page(page_of(1000))
    assert page.locator("#adapter-table tbody tr:not([hidden])").count() == 30
    times = page.evaluate("""async () => {
      const best = {};
      const search = document.getElementById("search");
      for (let round = 0; round < 5; round += 1) {
        for (const text of ["s", "st", "strings_07", "nothing", ""]) {
          const start = performance.now();
          search.value = text;
          search.dispatchEvent(new Event("input"));
          document.body.offsetHeight;
          best[text] = Math.min(best[text] ?? Infinity, performance.now() - start);
          await new Promise((done) => requestAnimationFrame(() => setTimeout(done)));
        }
      }
      return best;
    }""")
    assert max(times.values()) < MOST_SEARCH_MS, times
    page.fill("#search", "strings")
    assert page.locator("#matches").inner_text() == "250 of 1,000 adapters"
    page.click("#more-lines")
    assert page.locator("#adapter-table tbody tr:not([hidden])").count() == 60


def barriers_in_all_views(page: Any) -> list[tuple[int, str, str]]:
    """On a screen and on a phone, light and dark."""
    found = []
    for width, scheme in VIEWS:
        page.set_viewport_size({"width": width, "height": 900})
        page.emulate_media(color_scheme=scheme)
        # The map is drawn anew a moment after the width changed.
        page.locator(
            f"#plot-map svg[width='{page.locator('#plot-map').evaluate('e => e.clientWidth') - 2}']"
        ).wait_for()
        found += [(width, scheme, barrier) for barrier in barriers(page)]
    return found


def ask(page: Any, *, beside: str = "", prompt: str = "Capital:") -> None:
    page.locator("#model-1 option").first.wait_for(state="attached")
    page.fill("#prompt", prompt)
    page.select_option("#model-2", beside)
    page.click("#run")
    page.locator("#run:not([disabled])").wait_for()


def test_two_models_answer_side_by_side_with_receipts(open_page: OpenPage, server: PageServer) -> None:
    page = open_page(server.url)
    ask(page, beside="lib@arrow")
    assert page.locator("#model-1 option").all_inner_texts() == list(MODELS)
    for side in (1, 2):
        assert page.locator(f"#pane-{side} .reply").text_content() == "".join(PIECES)
        receipt = page.locator(f"#pane-{side} .routed").inner_text()
        for words in (
            "0.82 reaches the threshold 0.50.",
            "auto, by the rule contrast",
            "6.4 ms",
            "2 not chosen",
            "req-1",
        ):
            assert words in receipt
    assert [(path, body["model"], body["stream"], body["trace"]) for path, body in sorted(server.asked, key=str)] == [
        ("/v1/completions", model, True, True) for model in ("lib", "lib@arrow")
    ]
    tokens = page.locator("#pane-1 .token")
    assert tokens.all_inner_texts() == ["Capital", "↵", " Paris"]
    tokens.nth(0).hover()
    assert page.locator("#pane-1 .token-experts").inner_text().split()[-4:] == [
        "facts_0002",
        "0.90",
        "dates_0001",
        "0.10",
    ]
    tokens.nth(0).focus()
    page.keyboard.press("ArrowRight")
    # A server that tells the layers of a token has them shown.
    assert page.locator("#pane-1 .token-experts").inner_text().split("\n") == [
        "Token 2 of 3: “↵”", "layer 7\tdates_0001 1.00",
    ]  # fmt: skip


def test_chat_and_a_dry_run_ask_what_they_should(open_page: OpenPage, server: PageServer) -> None:
    page = open_page(server.url)
    page.select_option("#format", "chat")
    page.uncheck("#trace")
    ask(page)
    # Without a trace the receipt is that of the request's id.
    assert "req-1" in page.locator("#pane-1 .routed").inner_text()
    assert page.locator("#pane-1 .token").count() == 0
    page.click("#route")
    page.locator("#run:not([disabled])").wait_for()
    assert page.locator("#pane-1 .outcome").inner_text() == "Decided, not answered."
    (first, chat), (second, route) = server.asked
    messages = [{"role": "user", "content": "Capital:"}]
    assert (first, chat["messages"], chat["trace"]) == ("/v1/chat/completions", messages, False)
    assert (second, route) == ("/v1/route", {"model": "lib", "messages": messages, "trace": False})


def test_errors_are_told_where_the_answer_would_stand(
    open_page: OpenPage, server: PageServer, complaints: list[str]
) -> None:
    page = open_page(server.url)
    ask(page, beside="base")
    assert page.locator("#pane-2 .outcome").inner_text() == REFUSAL
    assert page.locator("#pane-1 .reply").text_content() == "".join(PIECES)
    server.is_cut = True
    ask(page)
    assert page.locator("#pane-1 .outcome").inner_text() == "The answer broke off."
    assert page.locator("#pane-2").is_hidden()
    # Chromium itself notes each answer that is an error.
    assert [text for text in complaints if "400" not in text] == []
    complaints.clear()


def test_a_token_is_asked_for_and_kept_in_memory_only(
    open_page: OpenPage, server: PageServer, complaints: list[str]
) -> None:
    server.token = "secret"
    page = open_page(server.url)
    page.locator("#token-form:not([hidden])").wait_for()
    for token, words in (("wrong", "The server does not take this token."), ("secret", "")):
        page.fill("#token", token)
        page.click("#token-form button")
        page.locator("#ask-note", has_text=words).wait_for(state="attached")
    page.locator("#decision-rows tr").first.wait_for()
    assert page.locator("#token-form").is_hidden()
    ask(page)
    assert len(server.asked) == 1
    kept = page.evaluate("[document.cookie, localStorage.length, sessionStorage.length, document.body.outerHTML]")
    assert kept[:3] == ["", 0, 0]
    assert "secret" not in kept[3]
    assert [text for text in complaints if "401" not in text] == []
    complaints.clear()


def test_nothing_bars_anybody_from_the_live_page(open_page: OpenPage, server: PageServer) -> None:
    page = open_page(server.url)
    ask(page, beside="lib@arrow")
    page.locator("#decision-rows button").first.click()
    page.locator("#decision-shown h3").wait_for()
    receipt = page.locator("#decision-shown").inner_text()
    assert "arrow: strings_0003" in receipt
    assert "confidence −1.25, threshold 0.00" in receipt
    meter = page.locator("#decision-shown .meter").evaluate(
        "(box) => [...box.children].map((part) => part.offsetLeft / box.clientWidth)"
    )
    assert meter == pytest.approx([0, 1.25 / 2.25], abs=0.02)
    facts = page.locator("#usage-facts").inner_text().split("\n")
    assert [text for text in facts if text][1::2] == ["1,234", "57 (4.6 %)", "arrow", "240", "199 (82.9 %)"]
    assert page.locator("#usage-bars b").all_inner_texts() == ["700", "320"]
    page.evaluate("document.querySelectorAll('details').forEach((element) => { element.open = true; })")
    assert barriers_in_all_views(page) == []
