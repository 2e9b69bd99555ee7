"""A screenshot of a report page, taken by a headless Chromium if one is installed."""

import shutil
import subprocess
import tempfile
from pathlib import Path

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
TIMEOUT = 120  # seconds


def save_screenshot(page: Path, image: Path, width: int = 1240, height: int = 4600) -> str:
    """Write the top `width` x `height` pixels of a page as PNG; returns the reason if it fails, else ""."""
    browser = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if browser is None:
        return f"none of {', '.join(BROWSERS)} is on PATH"
    # temporary profile: does not touch the user's browser; no host resolves: nothing is fetched
    with tempfile.TemporaryDirectory() as profile:
        target = Path(profile) / "page.png"
        command = [
            browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
            f"--user-data-dir={profile}", "--host-resolver-rules=MAP * ~NOTFOUND", "--no-first-run",
            f"--window-size={width},{height}", f"--screenshot={target}", page.resolve().as_uri(),
        ]  # fmt: skip
        try:
            result = subprocess.run(command, capture_output=True, timeout=TIMEOUT, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:
            return f"{browser}: {type(error).__name__}"
        if result.returncode or not target.exists():
            return f"{browser} exited with status {result.returncode}"
        shutil.move(target, image)
    return ""
