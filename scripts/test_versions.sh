#!/usr/bin/env bash
# The operator library in ONNX Runtime 1.22, 1.25, 1.28 and 1.31: the wheels of scripts/versions/ in folders
# .venv-ort/VERSION, beside the numpy and onnx of MX_PYTHON, and tests/python/test_versions.py in each.
# All must compute the same bits. A wheel that cannot be had is a failure, unless MX_REQUIRE lacks `versions`.
set -euo pipefail
. "$(dirname "$0")/env.sh"
setup_rust
setup_python
MX_REQUIRE=${MX_REQUIRE-versions}
[ -n "${MX_CUSTOM_OPS:-}" ] || cargo build --locked >&2
built=$(realpath -m "${CARGO_TARGET_DIR:-target}")/debug
export MX_CUSTOM_OPS=${MX_CUSTOM_OPS:-$built/libmx_custom_ops.so}
export MX_REWRITE=${MX_REWRITE:-$built/mxrewrite}
export PYTHONDONTWRITEBYTECODE=1

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"$MX_PYTHON" tests/python/test_versions.py --make "$work"
for requirements in scripts/versions/requirements-*.txt; do
    version=${requirements##*-}
    version=${version%.txt}
    folder=.venv-ort/$version
    if [ ! -f "$folder/complete" ]; then
        say "onnxruntime $version into $folder"
        rm -rf "$folder"
        if ! "$MX_PYTHON" -m pip install --quiet --disable-pip-version-check --no-deps --only-binary :all: \
            --target "$folder" -r "$requirements" >&2; then
            case ",$MX_REQUIRE," in
            *,versions,*) echo "error: no onnxruntime $version, and MX_REQUIRE=$MX_REQUIRE" >&2; exit 1 ;;
            esac
            echo "skipped: onnxruntime $version cannot be installed for $MX_PYTHON (see above)"
            continue
        fi
        touch "$folder/complete"
    fi
    PYTHONPATH=$root/$folder "$MX_PYTHON" tests/python/test_versions.py --expect "$version" "$work"
done
