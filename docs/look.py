"""Looks at every page of the built site in a browser: wide and as narrow as a phone.

    pip install playwright && playwright install chromium
    python -m sphinx -W -n -b html docs site
    python docs/look.py site    # ends with 1 if something is wrong on a page
    python docs/look.py site --pictures runs/pages --only methods    # and for the eye, light and dark

What is looked for: a page that is wider than the window, a picture that does not load, a formula that
is not drawn, has an error, or does not fit. MathJax draws them, a script from the internet; without
that, npm has it:

    npm install mathjax@4 @mathjax/mathjax-newcm-font@4
    python docs/look.py site --packages node_modules
"""

import argparse
import contextlib
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from playwright.sync_api import Page, Route, TimeoutError, sync_playwright

WINDOWS = {"desktop": {"width": 1280, "height": 900}, "phone": {"width": 390, "height": 844}}
SCHEMES: tuple[Literal["light", "dark"], ...] = ("light", "dark")
FAULTS = """() => {
  const width = document.documentElement.clientWidth;
  const formulas = [...document.querySelectorAll('mjx-container[display="true"]')];
  const right = (formula) => formula.firstElementChild.getBoundingClientRect().right;
  return {
    'pixels too wide': Math.max(0, document.documentElement.scrollWidth - width),
    'pictures missing': [...document.images].filter((image) => !image.naturalWidth).length,
    'formulas not drawn': [...document.querySelectorAll('.math')].filter(
      (formula) => !formula.querySelector('mjx-container')).length,
    'formulas with errors': document.querySelectorAll('mjx-merror').length,
    'formulas too wide': formulas.filter((formula) => right(formula) > width + 1).length,
  };
}"""
DRAWN = "[...document.querySelectorAll('.math')].every((one) => one.querySelector('mjx-container'))"


def from_packages(folder: Path) -> Callable[[Route], None]:
    """Answers requests for npm packages, such as mathjax@4/tex.js, with files of a folder."""

    def answer(route: Route) -> None:
        file = folder / re.sub(r"(?<=.)@[\d.]+/", "/", route.request.url.partition("/npm/")[2])
        if file.is_file():
            route.fulfill(path=file, headers={"Access-Control-Allow-Origin": "*"})
        else:
            route.abort()

    return answer


def faults(page: Page, file: Path) -> dict[str, int]:
    """Opens a page and counts what is wrong with it."""
    page.goto(file.resolve().as_uri(), timeout=120_000)
    if page.query_selector(".math"):
        with contextlib.suppress(TimeoutError):  # is counted as not drawn
            page.wait_for_function(DRAWN, timeout=30_000)
    counts: dict[str, int] = page.evaluate(FAULTS)
    return {name: count for name, count in counts.items() if count}


def main() -> int:
    """Visits the pages.

    Returns:
      How many visits found a fault.
    """
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("site", type=Path, help="folder of the built site")
    parser.add_argument("--only", default="", help="only pages whose path has this in it")
    parser.add_argument("--pictures", type=Path, help="two pictures of each visit go here")
    parser.add_argument("--packages", type=Path, help="folder node_modules, with MathJax")
    parser.add_argument("--browser", help="path of a Chromium that is installed already")
    arguments = parser.parse_args()
    files = [
        file
        for file in sorted(arguments.site.rglob("*.html"))
        if "_modules" not in file.parts and arguments.only in str(file.relative_to(arguments.site))
    ]

    failed = 0
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=arguments.browser)
        for window, size in WINDOWS.items():
            options: dict[str, Any] = {"viewport": size}
            page = browser.new_page(**options)
            if arguments.packages:
                page.route("**/npm/**", from_packages(arguments.packages))
            for file in files:
                name = file.relative_to(arguments.site).with_suffix("").as_posix()
                if found := faults(page, file):
                    failed += 1
                    print(f"{name}, {window}: {found}", flush=True)
                for scheme in SCHEMES if arguments.pictures else ():
                    page.emulate_media(color_scheme=scheme)
                    picture = f"{name.replace('/', '_')}_{window}_{scheme}.png"
                    page.screenshot(path=arguments.pictures / picture, full_page=True)
    print(f"{len(files)} pages, {failed} of {len(WINDOWS) * len(files)} visits found a fault")
    return failed


if __name__ == "__main__":
    sys.exit(min(main(), 1))
