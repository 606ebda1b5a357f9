"""Configuration: the frozen dataclasses of `schema` and the YAML groups that fill them."""
