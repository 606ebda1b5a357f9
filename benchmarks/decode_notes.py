"""What decode.py's figures do not say themselves; part of every result."""

NOTES: list[str] = []
