"""Headless Chromium for the pages of reports; tests skip where there is none."""

import shutil

import pytest

FLAGS = [
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@pytest.fixture(scope="module")
def chromium():
    """A browser with an empty profile of its own.

    Of a module, not of the session: while playwright runs, asyncio.run refuses to.
    """
    sync_api = pytest.importorskip(
        "playwright.sync_api", reason="playwright is not installed (extra dev)"
    )
    names = ("chromium", "chromium-browser", "google-chrome")
    path = next(filter(None, map(shutil.which, names)), None)
    if path is None:
        pytest.skip(f"no Chromium on the path ({', '.join(names)})")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=path, chromium_sandbox=False, args=FLAGS
        )
        yield browser
        browser.close()


@pytest.fixture
def open_page(chromium):
    """Opens a file; afterwards nothing may have been logged, requested or thrown."""
    page = chromium.new_page()
    faults = []
    page.on("console", lambda message: faults.append(message.text))
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("dialog", lambda dialog: faults.append(f"dialog {dialog.message}"))
    page.on(
        "request", lambda r: None if r.url.startswith(("file:", "data:")) else faults.append(r.url)
    )

    def open_file(path, state=""):
        page.goto(f"{path.resolve().as_uri()}{state}")
        return page

    yield open_file
    page.close()
    assert faults == []
