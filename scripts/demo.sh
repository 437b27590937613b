#!/usr/bin/env bash
# The whole chain on the model that comes with the project: build, rewrite tinylm for every stage,
# evaluate each graph on mini_pile in stock ONNX Runtime, print the table. Needs Rust and Python.
#
#   scripts/demo.sh [OUT_DIR]        default demo_out
set -euo pipefail
out=${1:-}
[ -z "$out" ] || out=$(realpath -m "$out")
. "$(dirname "$0")/env.sh"
out=${out:-$root/demo_out}
setup_rust
setup_python

say "building (release)"
cargo build --release --locked --workspace >&2

bin=${CARGO_TARGET_DIR:-target}/release
model=fixtures/tinylm/dynamo/model.onnx
say "what tier A would replace in $model"
"$bin/mxrewrite" "$model" --tier-a --plan

say "every stage on fixtures/mini_pile.parquet"
"$bin/mxeval" --sweep "$model" --tokenizer fixtures/tinylm/tokenizer.json \
    --data fixtures/mini_pile.parquet --seq-len 512 --batch-size 8 --device cpu --out "$out"

echo
echo "report: $out/report.md   records: $out/results.jsonl   run: $out/run.json"
