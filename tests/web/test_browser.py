"""Pages of the catalogue in Chromium: no overflow, no violation of the content policy, no finding of axe."""

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, expect

from tests.api.live import LocalService
from tests.web.conftest import COMING, DEFAULT, REFERENCE

PAGES = ["/", "/models", "/models?q=zebra", f"/models/{COMING}", f"/models/{REFERENCE}", "/models/tiny_llama",
         "/compare", f"/compare?models={DEFAULT},{REFERENCE},{COMING}", "/docs", "/status", "/playground",
         "/nothing"]  # fmt: skip


def opened(browser: Browser, service: LocalService, path: str, width: int = 1280, **context: object) -> Page:
    page = browser.new_context(
        viewport={"width": width, "height": 900},
        base_url=service.url,
        **context,  # pyright: ignore[reportArgumentType]
    ).new_page()
    complaints: list[str] = []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto(path)
    # Chromium reports a page's own 404 on its console; any other message is a fault of ours.
    assert not [text for text in complaints if "404" not in text], complaints
    return page


def faultless_in_both_schemes(page: Page) -> None:
    """Look for faults in light and dark colours, without another load: a style sheet alone tells the schemes apart."""
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        assert page.evaluate("matchMedia('(prefers-color-scheme: dark)').matches") == (scheme == "dark")
        results = Axe().run(page)
        assert results.violations_count == 0, (scheme, results.generate_report())


@pytest.mark.parametrize("path", PAGES)
def test_axe_finds_nothing(browser: Browser, service: LocalService, path: str) -> None:
    page = opened(browser, service, path)
    for details in page.locator("details").all():
        details.evaluate("element => element.open = true")
    faultless_in_both_schemes(page)
    page.context.close()


def test_axe_finds_nothing_in_a_heat_map(browser: Browser, service: LocalService) -> None:
    page = opened(browser, service, "/playground")
    page.get_by_role("button", name="Compare the texts").click()
    expect(page.get_by_role("heading", name="How alike the texts are")).to_be_visible()
    # Show every shade, whatever similarities the model computes.
    page.evaluate("document.querySelectorAll('.heat td[class]').forEach((cell, at) => cell.className = 'h' + at % 10)")
    faultless_in_both_schemes(page)
    page.context.close()


@pytest.mark.parametrize("path", PAGES)
def test_nothing_is_wider_than_the_screen(browser: Browser, service: LocalService, path: str) -> None:
    page = opened(browser, service, path, 360)
    for width in (360, 390, 768, 1280, 1920):
        page.set_viewport_size({"width": width, "height": 900})
        assert page.evaluate("window.innerWidth") == width
        assert page.evaluate("document.documentElement.scrollWidth") <= width, width
    page.context.close()


def test_everything_works_without_a_script(browser: Browser, service: LocalService) -> None:
    page = opened(browser, service, "/models", java_script_enabled=False)
    page.get_by_label("Status").select_option("coming soon")
    page.get_by_label("Search").fill("sheared")
    page.get_by_role("button", name="Show").click()
    assert "status=coming+soon" in page.url and page.locator(".models tbody tr").count() == 2
    for box in page.locator(".models input[type=checkbox]").all():
        box.check()
    page.get_by_role("button", name="Compare the ticked models").click()
    assert page.url.endswith("mntp-unsup-simcse") and page.locator("tr.differs").count() > 5
    page.goto("/models/tiny_llama")
    expect(page.locator("#call-curl-code")).to_be_visible()
    page.get_by_text("Python", exact=True).click()
    expect(page.locator("#call-python-code")).to_be_visible()
    expect(page.locator("#call-curl-code")).not_to_be_visible()
    assert page.locator("button.copy:visible").count() == 0  # without a script they have no function
    page.goto("/playground")
    page.get_by_role("button", name="Compare the texts").click()
    assert page.locator(".heat tbody tr").count() == 5
    page.context.close()


def test_copying_with_a_script(browser: Browser, service: LocalService) -> None:
    page = opened(browser, service, "/models/tiny_llama", permissions=["clipboard-read", "clipboard-write"])
    page.locator(".p1 .copy").click()
    expect(page.locator(".p1 .copy")).to_have_text("Copied")
    assert page.evaluate("navigator.clipboard.readText()") == page.locator("#call-curl-code").text_content()
    page.context.close()


def test_the_tabs_and_the_skip_link_work_by_keyboard(browser: Browser, service: LocalService) -> None:
    page = opened(browser, service, "/models/tiny_llama")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the content"
    page.locator("#call-curl").focus()
    page.keyboard.press("ArrowRight")
    expect(page.locator("#call-python-code")).to_be_visible()
    page.context.close()


def test_a_model_page_needs_three_requests(browser: Browser, service: LocalService) -> None:
    page = browser.new_context(base_url=service.url).new_page()
    requests: list[str] = []
    page.on("request", lambda request: requests.append(request.url.removeprefix(service.url)))
    page.goto(f"/models/{COMING}")
    page.wait_for_load_state("networkidle")
    elsewhere = [url for url in requests if not url.startswith("/")]
    assert not elsewhere
    assert len([url for url in requests if "favicon" not in url]) == 3, requests  # the page, its style, its script
    page.context.close()
