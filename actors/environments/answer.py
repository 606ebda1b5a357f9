"""The answer inside what a model wrote, and numbers inside answers."""

from __future__ import annotations

import math
import re

_TAGGED = re.compile(r"<answer>(.*?)</answer>", re.DOTALL | re.IGNORECASE)
_LABELLED = re.compile(r"\banswer:", re.IGNORECASE)
_NUMBER = re.compile(r"[-+]?(?:\d[\d,]*\.?\d*|\.\d+)(?:[eE][-+]?\d+)?")


def extract_answer(text: str) -> str:
    """The last <answer>...</answer>; else what follows the last "Answer:"; else everything; always after any </think>, and
    before a <think> that nothing ends: what is still being thought is no answer."""
    said = text.rsplit("</think>", 1)[-1].partition("<think>")[0]
    tagged = _TAGGED.findall(said)
    if tagged:
        return str(tagged[-1]).strip()
    return _LABELLED.split(said)[-1].strip()


def last_number(text: str) -> float | None:
    """The last number in `text` (thousands separators allowed), or None."""
    found = _NUMBER.findall(text)
    return to_number(found[-1].rstrip(".")) if found else None


def to_number(value: object) -> float | None:
    """`value` as a finite float if it is a number or the text of one, else None."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        number = float(value.replace(",", "").strip() if isinstance(value, str) else value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def same_number(left: float, right: float) -> bool:
    """Equal to 1 part in a million, or to 1e-9."""
    return math.isclose(left, right, rel_tol=1e-6, abs_tol=1e-9)
