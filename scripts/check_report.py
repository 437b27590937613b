#!/usr/bin/env python3
"""Opens report.html files in headless Chromium as people do and says what it found.

    scripts/check_report.py REPORT.html [...] [--out DIR] [--chromium PATH]

Needs `pip install playwright` and a Chromium (apt-get install chromium, or `playwright install chromium`);
by hand, not in CI. Screenshots at desktop and phone width, light and dark, and a PDF go to --out, to be
looked at. Fails on console messages, network requests, files of 2 MB, pages wider than the window, plots
without words and texts of a plot that lie over each other or outside it.
"""

import argparse
import pathlib
import shutil
import sys

from playwright.sync_api import sync_playwright

WINDOWS = {"desktop": (1280, 900), "phone": (390, 844)}
LARGEST = 2_000_000

# Pairs of texts of a plot whose boxes overlap by more than a pixel, and texts outside their plot.
CROWDED = """() => {
  const found = [];
  for (const svg of document.querySelectorAll('svg')) {
    const name = svg.querySelector('title').textContent;
    const frame = svg.getBoundingClientRect();
    const texts = [...svg.querySelectorAll('text')].map(t => [t.textContent.trim(), t.getBoundingClientRect()]);
    texts.forEach(([text, a], i) => {
      if (a.left < frame.left - 1 || a.right > frame.right + 1 || a.top < frame.top - 1 || a.bottom > frame.bottom + 1)
        found.push(`${name}: "${text}" is cut off`);
      for (const [other, b] of texts.slice(i + 1)) {
        const wide = Math.min(a.right, b.right) - Math.max(a.left, b.left);
        const tall = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
        // Boxes of lines are taller than their letters.
        if (wide > 1 && tall > 4) found.push(`${name}: "${text}" lies over "${other}"`);
      }
    });
  }
  return found;
}"""

WORDLESS = """() => [...document.querySelectorAll('svg')].filter(svg =>
  svg.getAttribute('role') !== 'img' || !svg.getAttribute('aria-label') ||
  !svg.querySelector('title')?.textContent || !svg.querySelector('desc')?.textContent).length"""

# Font sizes of plots as they come out on the screen.
SMALLEST = """() => Math.min(99, ...[...document.querySelectorAll('svg text')].map(t =>
  parseFloat(getComputedStyle(t).fontSize) * Math.hypot(t.getScreenCTM().a, t.getScreenCTM().b)))"""


def check(browser, path: pathlib.Path, out: pathlib.Path) -> list[str]:
    faults = []
    size = path.stat().st_size
    if size >= LARGEST:
        faults.append(f"{size} bytes")
    seen = [f"{size} bytes"]
    for scheme in ("light", "dark"):
        for window, (width, height) in WINDOWS.items():
            context = browser.new_context(
                viewport={"width": width, "height": height}, color_scheme=scheme, device_scale_factor=1
            )
            page = context.new_page()
            page.on("console", lambda message: faults.append(f"console: {message.text}"))
            page.on("pageerror", lambda error: faults.append(f"error: {error}"))
            page.on(
                "request",
                lambda request: faults.append(f"request: {request.url}")
                if request.url != path.as_uri() and not request.url.startswith("data:")
                else None,
            )
            page.goto(path.as_uri())
            wide = page.evaluate("document.documentElement.scrollWidth")
            if wide > width:
                faults.append(f"{window}: the page is {wide} pixels wide in a window of {width}")
            smallest = page.evaluate(SMALLEST)
            if smallest < 9.5:
                faults.append(f"{window}: text of {smallest:.1f} pixels in a plot")
            if scheme == "light":
                faults += [f"{window}: {fault}" for fault in page.evaluate(CROWDED)]
                if wordless := page.evaluate(WORDLESS):
                    faults.append(f"{wordless} plots without words")
                if window == "desktop":
                    plots, tables = (page.locator(what).count() for what in ("svg", "table"))
                    seen.append(f"{plots} plots, {tables} tables")
                    page.pdf(path=out / f"{path.stem}.pdf", format="A4", print_background=True)
            page.screenshot(path=out / f"{path.stem}-{window}-{scheme}.png", full_page=True)
            seen.append(f"{window} {scheme}: {wide} px wide, plot text from {smallest:.1f} px")
            context.close()
    print(f"{path}: " + "; ".join(seen))
    return faults


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("reports", nargs="+", type=pathlib.Path)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("report_check"))
    parser.add_argument("--chromium", default=shutil.which("chromium"), help="default: chromium in PATH, else playwright's")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    faults = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=args.chromium, args=["--no-sandbox"])
        print(f"Chromium {browser.version}")
        for report in args.reports:
            faults += [f"{report}: {fault}" for fault in check(browser, report.resolve(), args.out)]
        browser.close()
    print(f"screenshots and PDF: {args.out}")
    for fault in dict.fromkeys(faults):
        print(f"fault: {fault}")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
