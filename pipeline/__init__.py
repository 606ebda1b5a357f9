"""What decides: pure asyncio over three small interfaces. Read `run.py` first."""
