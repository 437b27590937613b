"""Build backend of the Python package: maturin, which makes the extension module, after the operator
library was built by cargo and put into the package.

maturin takes one library a wheel. The operator library has to be another one: C++ and Rust programs load it,
too, and it must not need Python.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import maturin
from maturin import (
    build_sdist,
    get_requires_for_build_editable,
    get_requires_for_build_sdist,
    get_requires_for_build_wheel,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]

ROOT = Path(__file__).resolve().parents[2]
LIBRARY = "libmx_custom_ops.so"


def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
    """PEP 517's hook."""
    _build_library()
    return maturin.build_wheel(wheel_directory, config_settings, metadata_directory)


def build_editable(wheel_directory, config_settings=None, metadata_directory=None):
    """PEP 660's hook."""
    _build_library()
    return maturin.build_editable(wheel_directory, config_settings, metadata_directory)


def _build_library():
    """Builds the operator library and puts it into the package, without debug information."""
    cargo = _cargo()
    target = Path(os.environ.get("CARGO_TARGET_DIR") or ROOT / "target").resolve()
    # Both packages in one call: they share what both need, so it is compiled once.
    command = [cargo, "build", "--release", "--locked", "-p", "mx-custom-ops", "-p", "mxrewrite-python"]
    environment = {**os.environ, "CARGO_TARGET_DIR": str(target), "PYO3_BUILD_EXTENSION_MODULE": "1"}
    print(f"building {LIBRARY}: {' '.join(command)}", file=sys.stderr, flush=True)
    subprocess.run(command, cwd=ROOT, env=environment, check=True)
    built = target / "release" / LIBRARY
    if not built.is_file():
        raise SystemExit(f"cargo made no {built}; the package supports Linux only")
    package = ROOT / "python" / "mxrewrite"
    # Another build may be reading the old one.
    temporary = package / f"{LIBRARY}.{os.getpid()}"
    strip = shutil.which("strip")
    if strip:
        subprocess.run([strip, "--strip-unneeded", "-o", temporary, built], check=True)
    else:
        shutil.copyfile(built, temporary)
    temporary.chmod(0o755)
    temporary.replace(package / LIBRARY)


def _cargo():
    found = shutil.which("cargo") or shutil.which("cargo", path=Path.home() / ".cargo" / "bin")
    if not found:
        raise SystemExit("cargo is missing: install Rust from https://rustup.rs and run this again")
    return found
