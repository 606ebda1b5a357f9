"""The tree of exceptions: whole, drawn, and each rebuilt where it is caught."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

import pytest

from weft.transport import errors
from weft.transport.errors import RemoteError, TransportError, WeftError
from weft.transport.session import Kind, pack_error, unpack_error

ROOT = Path(__file__).resolve().parents[2]
TREE = {name: cls for name, cls in vars(errors).items() if inspect.isclass(cls) and issubclass(cls, WeftError)}


def test_every_exception_of_the_tree_is_in_its_one_file_and_in_its_drawing() -> None:
    """One that is defined elsewhere arrives as a RemoteError, which no `except` knows by its name."""
    outside = [
        f"{path.relative_to(ROOT)}: {node.name}"
        for folder in ("actors", "configs", "kernels", "pipeline", "transport")
        for path in (ROOT / folder).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ClassDef) and path.name != "errors.py"
        if {getattr(base, "id", getattr(base, "attr", "")) for base in node.bases} & TREE.keys()
    ]
    assert not outside
    drawing = errors.__doc__ or ""
    assert not [name for name in TREE if f" {name} " not in f"{drawing.replace(chr(10), ' ')} "]


@pytest.mark.parametrize("cls", [cls for cls in TREE.values() if not issubclass(cls, TransportError)])
def test_every_exception_but_those_about_a_third_party_arrives_as_what_it_was(cls: type[WeftError]) -> None:
    arrived = unpack_error(Kind.ERROR, [pack_error(cls("why"))], "sampler-0")
    assert type(arrived) is cls
    assert arrived.args == ("why",)
    assert isinstance(arrived, RemoteError) or "raised at sampler-0" in arrived.__notes__[0]
