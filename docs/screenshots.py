"""Take the screenshots of the docs anew: `python docs/screenshots.py`. Needs Chromium and the default model.

A server with accounts runs on an empty database. A person signs up, makes a key and sends a few requests. The head of
the evaluation's report is one more picture.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright

from unmask.checkpoint import DEFAULT_MODEL as MODEL

DOCS = Path(__file__).parent
IMAGES = DOCS / "images"
PERSON, PASSWORD = "ada@example.org", "correct horse battery"
TEXTS = ("how much protein should a female eat", "As a general guideline, 46 grams per day.")


def command(*arguments: str, database: str) -> str:
    words = [sys.executable, "-m", "unmask", *arguments, "--database", database]
    return subprocess.run(words, check=True, capture_output=True, text=True).stdout.strip()


def save(page: Page, name: str, *, whole: bool = True) -> None:
    """Write a page as `images/NAME.webp`; a whole page is scaled down to two thirds."""
    with tempfile.NamedTemporaryFile(suffix=".png") as file:
        page.screenshot(path=file.name, full_page=whole)
        image = Image.open(file.name).convert("RGB")
        if whole:
            image = image.resize((860, round(image.height * 860 / image.width)), Image.Resampling.LANCZOS)
        image.save(IMAGES / f"{name}.webp", quality=80, method=6)


def wait_until_ready(url: str) -> None:
    while True:
        try:
            return urllib.request.urlopen(f"{url}/ready").close()
        except urllib.error.HTTPError:
            time.sleep(1)


def send_requests(url: str, key: str) -> None:
    for count in range(1, 9):
        body = json.dumps({"model": MODEL, "input": [*TEXTS] * count}).encode()
        headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
        urllib.request.urlopen(urllib.request.Request(f"{url}/v1/embeddings", body, headers)).close()


def take_report(browser: Browser) -> None:
    """Take the head of the report."""
    page = browser.new_page(viewport={"width": 1100, "height": 760}, device_scale_factor=1.3)
    page.goto((DOCS / "evaluation" / "report.html").resolve().as_uri())
    page.screenshot(path=DOCS / "evaluation" / "report.png")


def take(url: str, database: str) -> None:
    """Take all screenshots of the server at `url`, and that of the report."""
    program = shutil.which("chromium") or shutil.which("google-chrome")
    wait_until_ready(url)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox", "--disable-dev-shm-usage"])
        page = browser.new_page(viewport={"width": 1280, "height": 800})
        page.goto(f"{url}/sign-up")
        page.get_by_label("Mail address").fill(PERSON)
        page.get_by_label("Password").fill(PASSWORD)
        page.get_by_role("button", name="Sign up").click()
        page.get_by_label("Mail address").fill(PERSON)
        page.get_by_label("Password").fill(PASSWORD)
        page.get_by_role("button", name="Sign in").click()
        page.get_by_role("heading", name="Account", exact=True).wait_for()
        send_requests(url, command("accounts", "key", PERSON, "--name", "search", database=database).splitlines()[-1])
        page.goto(f"{url}/account")
        save(page, "account")
        page.goto(f"{url}/models")
        save(page, "models")
        page.goto(f"{url}/models/{MODEL}")
        save(page, "model-live")
        save(page, "model-head", whole=False)
        take_report(browser)
        browser.close()


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        database = f"sqlite:///{folder}/accounts.sqlite"
        command("accounts", "price", MODEL, "0.008", database=database)
        words = ["serve", "--accounts", "--database", database, "--free-credit", "5", "--port", "0", "--model", MODEL]
        words += ["--public-url", "http://127.0.0.1:8080"]
        server = subprocess.Popen(
            [sys.executable, "-m", "unmask", *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        try:
            assert server.stdout is not None
            url = next(place[0] for line in server.stdout if (place := re.search(r"http://127\.0\.0\.1:\d+", line)))
            take(url, database)
        finally:
            server.terminate()
            server.wait()


if __name__ == "__main__":
    os.environ.setdefault("COLUMNS", "1000")
    main()
