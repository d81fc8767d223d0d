"""Style sheet and script of the report page, and the colours of its charts.

The colours follow those of Okabe and Ito, which people who see no difference between red and green can tell apart,
darkened or lightened until each has a contrast of 3:1 or more on its background.
"""

from __future__ import annotations

from pathlib import Path

ASSETS = Path(__file__).resolve().parent / "assets"

LIGHT = {
    "bg": "#ffffff", "card": "#f6f7f9", "ink": "#1b1f24", "soft": "#57606a", "rule": "#d5dae0", "link": "#0b57b0",
    "up": "#00654a", "down": "#a33c00", "above": "0, 114, 178", "below": "213, 94, 0", "heat": "0, 114, 178",
}  # fmt: skip
DARK = {
    "bg": "#14171b", "card": "#1d2127", "ink": "#e8eaed", "soft": "#a3abb5", "rule": "#363c45", "link": "#8ab8ff",
    "up": "#4fd6a8", "down": "#ff9d5c", "above": "74, 158, 222", "below": "230, 120, 40", "heat": "74, 158, 222",
}  # fmt: skip
LIGHT_SERIES = ("#5b6470", "#0072b2", "#c44e00", "#007a59", "#a23b72", "#856000", "#4a43c4", "#0e6f80")
DARK_SERIES = ("#aab2bd", "#56b4e9", "#ff9d5c", "#3fd6a6", "#f08cc0", "#e6c229", "#aaa6ff", "#5fd0e0")


def _variables(colors: dict[str, str], series: tuple[str, ...]) -> str:
    named = colors | {f"s{i}": value for i, value in enumerate(series)}
    return " ".join(f"--{name}: {value};" for name, value in named.items())


def style_sheet() -> str:
    """The CSS of the page: colours of both themes, then `report.css`.

    Light unless the reader's system or the button of the page says dark.
    """
    light, dark = _variables(LIGHT, LIGHT_SERIES), _variables(DARK, DARK_SERIES)
    lines = [
        f":root {{ color-scheme: light; {light} }}",
        "@media (prefers-color-scheme: dark) {",
        f'  :root:not([data-theme="light"]) {{ color-scheme: dark; {dark} }}',
        "}",
        f':root[data-theme="dark"] {{ color-scheme: dark; {dark} }}',
        *(f".s{i} {{ --c: var(--s{i}); }}" for i in range(len(LIGHT_SERIES))),
    ]
    return "\n".join([*lines, (ASSETS / "report.css").read_text(encoding="utf-8")])


def script() -> str:
    """The JavaScript of the page."""
    return (ASSETS / "report.js").read_text(encoding="utf-8")
