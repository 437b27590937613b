"""Entry points of the two commands."""

from __future__ import annotations

import importlib.util
import os
import signal
import sys
from pathlib import Path

from . import _native


def mxrewrite() -> None:
    """The command `mxrewrite`."""
    sys.exit(_native.run_mxrewrite(_prepared("mxrewrite")))


def mxeval() -> None:
    """The command `mxeval`."""
    sys.exit(_native.run_mxeval(_prepared("mxeval")))


def _prepared(name: str) -> list[str]:
    """The arguments; and the environment in which the commands find what the package and its neighbours have."""
    # Rust's threads are busy while Python's handler would wait for them. A signal that is ignored stays so.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.environ.setdefault("MX_PYTHON", sys.executable)
    os.environ.setdefault("MX_OPS_LIBRARY", str(Path(__file__).with_name("libmx_custom_ops.so")))
    runtime = onnxruntime_library()
    if runtime:
        os.environ.setdefault("ORT_DYLIB_PATH", runtime)
    return [name, *sys.argv[1:]]


def onnxruntime_library() -> str | None:
    """libonnxruntime of the installed package, found without importing it."""
    spec = importlib.util.find_spec("onnxruntime")
    places = list(spec.submodule_search_locations or ()) if spec else []
    found = [path for place in places for path in Path(place, "capi").glob("libonnxruntime.so*")]
    # The versioned name is the longer one.
    return str(max(found, key=lambda path: path.name)) if found else None
