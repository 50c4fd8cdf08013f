"""Small pictures beside words: how a setting, a run or a phase looks in the plots. Pure."""

from __future__ import annotations

from tuner.report.figures.parts import PALETTE, SYMBOLS, Style

_SHAPES = {
    "circle": '<circle cx="17" cy="7" r="4.5"/>',
    "square": '<rect x="12.8" y="2.8" width="8.4" height="8.4"/>',
    "diamond": '<path d="M17 1.4 22.6 7 17 12.6 11.4 7z"/>',
    "triangle-up": '<path d="M17 1.8 22.4 11.4H11.6z"/>',
    "pentagon": '<path d="M17 1.6 22.3 5.4 20.3 11.8H13.7L11.7 5.4z"/>',
    "triangle-down": '<path d="M17 12.2 11.6 2.6H22.4z"/>',
}


def setting_swatch(style: Style) -> str:
    """A line with the setting's dash and symbol."""
    is_open = style.symbol.endswith("-open")
    dash = ' stroke-dasharray="6 3.5"' if style.dash == "dash" else ""
    line = f'<path d="M1 7H33" stroke="{style.colour}" stroke-width="2"{dash}/>'
    return _picture(34, line + _shape(style.symbol.removesuffix("-open"), style.colour, is_open))


def run_swatch(index: int) -> str:
    """The symbol of the run at this place."""
    return _picture(34, _shape(SYMBOLS[index % len(SYMBOLS)], PALETTE[index % len(PALETTE)], False))


def phase_swatch(colour: str) -> str:
    """A piece of a phase's bar; `@muted` is what the page calls so."""
    fill = "var(--muted)" if colour == "@muted" else colour
    opacity = ' fill-opacity=".45"' if colour == "@muted" else ""
    return _picture(14, f'<rect x="1" y="1" width="12" height="12" rx="2" fill="{fill}"{opacity}/>')


def _shape(symbol: str, colour: str, is_open: bool) -> str:
    fill = "var(--surface)" if is_open else colour
    return f'<g fill="{fill}" stroke="{colour}" stroke-width="2">{_SHAPES[symbol]}</g>'


def _picture(width: int, inside: str) -> str:
    size = f'width="{width}" height="14" viewBox="0 0 {width} 14"'
    return f'<svg class="swatch" {size} aria-hidden="true">{inside}</svg>'
