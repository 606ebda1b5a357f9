"""The tasks that weft brings along, each an `Environment`, and load.py, which builds one from the configuration."""
