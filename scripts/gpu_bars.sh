#!/usr/bin/env bash
# Measures what the project promises of a GPU machine: mxeval and the operators in ONNX Runtime, on real and on large models.
# scripts/pack_gpu.sh has put the programs into .gpu/ before; neither Rust nor a network is needed.
#
#   scripts/gpu_bars.sh [PART...]      default: verify eval smollm2 llama8b devices python
#
#   verify     mxrewrite verify of the fixture on cuda:0: every MX node on the GPU, layers against the original
#   eval       tests/python/gpu_eval.py: the fixture on GPUs against the CPU, every division of labour
#   smollm2    SmolLM2-135M, all 12 stages on cuda:0: each within 1e-3 of the CPU's cross-entropy
#   llama8b    a model of Llama 3.1 8B's shape with random weights, made here: time and memory of the MX stages against bf16
#   devices    the 12 stages of SmolLM2 on one GPU and on two: at least 1.7 times as fast, the same bits
#   python     tests/python/gpu_ops.py with rewritten models, and the program of docs/cuda.md as it stands there
#
# What they need:
#   ORT_DYLIB_PATH        libonnxruntime.so of a build with CUDA, its libraries on LD_LIBRARY_PATH
#   MX_PYTHON             (default python3) with numpy and onnx; onnxruntime-gpu and torch for `python`, pyarrow for Parquet
#   MX_SMOLLM2            folder with SmolLM2's model.onnx and tokenizer.json (default .venv-smollm2/model, of scripts/smollm2.sh)
#   MX_SMOLLM2_CPU        folder of mxeval's sweep of that model on the CPU (results.jsonl, run.json); documents, lengths and
#                         batches are taken from it
#   MX_DATA               the evaluation text of that sweep (default fixtures/mini_pile.parquet)
#   MX_LLAMA              folder for the large model, 16 GB (default /dev/shm/llama8b); kept when it is there
#   MX_WORK               folder for rewritten models, 20 GB (default /dev/shm/mx_work)
# MX_BARS_smollm2, MX_BARS_llama8b, ... hold more options of a part: tests/python/gpu_bars.py PART --help.
# MX_NVRTC, MX_CUBIN_DIR, MX_CACHE_DIR as in docs/cuda.md. Logs and records go to MX_GPU_LOGS (default .gpu/logs).
# Exit code 0: every part passed.
set -uo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/gpu_env.sh"
need_programs mxeval mxrewrite libmx_custom_ops.so
export MX_CUSTOM_OPS=${MX_CUSTOM_OPS:-$bin/libmx_custom_ops.so} PYTHONUNBUFFERED=1
smollm2=${MX_SMOLLM2:-$root/.venv-smollm2/model}
data=${MX_DATA:-$root/fixtures/mini_pile.parquet}

if [ ! -f "${ORT_DYLIB_PATH:-}" ]; then
    echo "error: set ORT_DYLIB_PATH to the libonnxruntime.so of onnxruntime-gpu" >&2
    exit 2
fi

bars() { # bars PART OPTION...
    local name=$1 more=MX_BARS_$1
    shift
    # shellcheck disable=SC2086 # several options in one variable
    part "$name" "$python" tests/python/gpu_bars.py "$name" --bin "$bin" --ort-lib "$ORT_DYLIB_PATH" \
        --work "${MX_WORK:-/dev/shm/mx_work}" --records "$logs" "$@" ${!more:-}
}

verify() { # outputs and every layer alone at 10 dB or better, no MX node on the CPU
    local work code
    work=$(mktemp -d) || return 1
    "$bin/mxrewrite" fixtures/tinylm/dynamo/model.onnx -o "$work/out.onnx" &&
        "$bin/mxrewrite" verify fixtures/tinylm/dynamo/model.onnx "$work/out.onnx" --device cuda:0 --layers \
            --min-sqnr 10 --ort-lib "$ORT_DYLIB_PATH"
    code=$?
    rm -rf "$work"
    return $code
}

say_machine
[ $# -gt 0 ] || set -- verify eval smollm2 llama8b devices python
for name in "$@"; do
    case $name in
        verify) part verify verify ;;
        eval) part eval "$python" tests/python/gpu_eval.py --mxeval "$bin/mxeval" --ort-lib "$ORT_DYLIB_PATH" ;;
        smollm2) bars smollm2 --model "$smollm2/model.onnx" --data "$data" --cpu "${MX_SMOLLM2_CPU:-$root/out/smollm2}" ;;
        llama8b) bars llama8b --model "${MX_LLAMA:-/dev/shm/llama8b}" ;;
        devices) bars devices --model "$smollm2/model.onnx" --data "$data" ;;
        python) bars python ;;
        *) echo "error: no part named '$name' (verify, eval, smollm2, llama8b, devices, python)" >&2; exit 2 ;;
    esac
done
finish
