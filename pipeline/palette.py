"""One colour an adapter, the same in the live table and in every plot; readable on white and on black (contrast of 3:1)."""

from __future__ import annotations

import colorsys

_FIRST = ("#3b76d6", "#dd6f17", "#2a9a5b", "#d8483f", "#8f5fd0", "#15929f", "#d2528f", "#96683f", "#7f8f1f", "#66788f")
_GOLDEN = 0.381966  # turns of the hue: neighbours in the list are far apart on the circle


def adapter_colour(index: int) -> str:
    """`#rrggbb` of the adapter that came as number `index`; distinct for the first ten, then by the golden angle."""
    if index < len(_FIRST):
        return _FIRST[index]
    red, green, blue = colorsys.hls_to_rgb((0.08 + index * _GOLDEN) % 1.0, 0.46, 0.5)
    return f"#{round(red * 255):02x}{round(green * 255):02x}{round(blue * 255):02x}"
