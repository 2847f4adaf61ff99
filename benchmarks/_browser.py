"""A headless Chromium that opens a page of ours, for the tests and the benchmark of the page."""

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PATIENCE = 60.0  # seconds; a busy machine is slow, which is no failure


def find() -> tuple[str, str] | None:
    """Paths of the browser and its driver; None when the machine has not both (Debian: chromium, chromium-driver)."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    return (browser, driver) if browser and driver else None


@contextmanager
def started(dark: bool = False) -> Iterator[Any]:
    """A selenium driver of a headless browser."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    found = find()
    assert found is not None
    options = webdriver.ChromeOptions()
    options.binary_location = found[0]
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
                     "--window-size=1500,1000", "--disable-background-networking"):  # fmt: skip
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(found[1]))
    try:
        if dark:
            media = {"features": [{"name": "prefers-color-scheme", "value": "dark"}]}
            driver.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
        yield driver
    finally:
        driver.quit()


def opened(driver: Any, path: Path, fragment: str = "") -> float:
    """Open a page; milliseconds from navigation to its first picture, as the page itself measured them."""
    driver.get("about:blank")  # else a new fragment alone would not load it again
    driver.get(path.resolve().as_uri() + fragment)
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until:
        ready = driver.execute_script("return document.documentElement.dataset.ready")
        if ready is not None:
            return float(ready)
        time.sleep(0.02)
    raise TimeoutError(f"{path} showed nothing: {driver.get_log('browser')}")
