# Sourced by the other scripts: puts Python with onnxruntime into .venv and exports what the
# commands and tests look for. Safe to run again; the second time it only checks a stamp.
#
#   MX_PYTHON       python with numpy, onnx, onnxruntime, safetensors, pyarrow
#   ORT_DYLIB_PATH  libonnxruntime.so of that onnxruntime
#   MX_NVRTC        libnvrtc.so, which compiles GPU kernels (only where setup_nvrtc is called)
#
# MX_PYTHON set by the caller is respected and nothing is installed.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"

say() { printf '== %s\n' "$*" >&2; }

# Installs Debian packages when a tool is missing and we may; otherwise says what to install.
need_tool() { # need_tool COMMAND PACKAGE
    command -v "$1" >/dev/null 2>&1 && return 0
    if command -v apt-get >/dev/null 2>&1 && [ "$(id -u)" = 0 ]; then
        say "installing $2 ($1 is missing)"
        { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq "$2"; } >&2 && return 0
    fi
    echo "error: '$1' is missing: install it (Debian/Ubuntu: sudo apt-get install $2) and run this again" >&2
    return 1
}

make_venv() {
    python3 -m venv .venv >/dev/null 2>&1 && return 0
    rm -rf .venv
    if command -v apt-get >/dev/null 2>&1 && [ "$(id -u)" = 0 ]; then
        say "installing python3-venv"
        { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq python3-venv; } >&2
        python3 -m venv .venv && return 0
    fi
    echo "error: python3 cannot make a virtual environment (Debian/Ubuntu: sudo apt-get install python3-venv)" >&2
    return 1
}

setup_python() {
    if [ -z "${MX_PYTHON:-}" ]; then
        local want
        want=$(cksum < scripts/requirements.txt)
        if [ "$(cat .venv/mxrewrite.stamp 2>/dev/null)" != "$want" ]; then
            need_tool python3 python3 || return 1
            say "installing onnxruntime into .venv"
            [ -x .venv/bin/python ] || make_venv || return 1
            .venv/bin/python -m pip install --quiet --disable-pip-version-check -r scripts/requirements.txt >&2 || return 1
            printf '%s' "$want" > .venv/mxrewrite.stamp
        fi
        MX_PYTHON=$root/.venv/bin/python
    fi
    export MX_PYTHON
    if [ -z "${ORT_DYLIB_PATH:-}" ]; then
        ORT_DYLIB_PATH=$("$MX_PYTHON" -c '
import glob, importlib.util, os
spec = importlib.util.find_spec("onnxruntime")
root = os.path.dirname(spec.origin) if spec else "."
found = sorted(glob.glob(os.path.join(root, "capi", "libonnxruntime.so.*")))
print(found[-1] if found else "")')
    fi
    if [ ! -f "$ORT_DYLIB_PATH" ]; then
        echo "error: no libonnxruntime.so beside $MX_PYTHON: install the onnxruntime wheel there, or set ORT_DYLIB_PATH" >&2
        return 1
    fi
    export ORT_DYLIB_PATH
}

# NVRTC, to compile GPU kernels without a GPU. Large (135 MB), so only the tests ask for it.
setup_nvrtc() { # after setup_python
    if [ -z "${MX_NVRTC:-}" ]; then
        MX_NVRTC=$("$MX_PYTHON" scripts/find_nvrtc.py) || MX_NVRTC=
        if [ -z "$MX_NVRTC" ] && [ "$MX_PYTHON" = "$root/.venv/bin/python" ]; then
            say "installing NVRTC into .venv"
            "$MX_PYTHON" -m pip install --quiet --disable-pip-version-check -r scripts/requirements-nvrtc.txt >&2 || return 1
            MX_NVRTC=$("$MX_PYTHON" scripts/find_nvrtc.py) || MX_NVRTC=
        fi
    fi
    # Without one, the loader's is looked for; the tests say so when there is none.
    [ -z "$MX_NVRTC" ] || export MX_NVRTC
}

setup_rust() {
    if ! command -v cargo >/dev/null 2>&1 && [ -x "$HOME/.cargo/bin/cargo" ]; then
        PATH=$HOME/.cargo/bin:$PATH
        export PATH
    fi
    if ! command -v cargo >/dev/null 2>&1; then
        echo "error: cargo is missing: install Rust (https://rustup.rs) and run this again" >&2
        return 1
    fi
    # zstd, oniguruma and aws-lc build C and C++ sources.
    need_tool cc build-essential && need_tool c++ build-essential
}
