#!/bin/sh
# Tests and measurements that need a GPU, in the order of their worth.
#   benchmarks/on_a_gpu.sh FOLDER      tests, then everything, results in FOLDER; PYTHON names the interpreter
set -u
OUTPUT=${1:?Expected a folder for the results.}
PYTHON=${PYTHON:-python}
mkdir -p "$OUTPUT"

measure() {
    NAME=$1
    shift
    "$PYTHON" benchmarks/inference.py --device cuda --json "$OUTPUT/$NAME.json" --plot "$OUTPUT/$NAME.png" "$@" 2>&1 |
        tee "$OUTPUT/$NAME.txt"
}

"$PYTHON" -m pytest -q tests/modeling/test_ragged.py tests/modeling/test_compiled_inference.py 2>&1 | tee "$OUTPUT/tests.txt"
# Selection beside a fixed K of the same mean, by each backend.
measure selection --dtype bfloat16 --batch-size 512 --batch-size 64 --mean-queries 9 --mean-queries 23 --mean-queries 38 \
    --num-active-queries 8 --repetitions 31
# Every budget, beside timm's ViT; one image first.
measure budgets --dtype bfloat16 --batch-size 1 --batch-size 512 --form eager --form optimized --compile-rivals --repetitions 31
"$PYTHON" benchmarks/attention_groups.py --device cuda 2>&1 | tee "$OUTPUT/attention_groups.txt"
measure float32 --dtype float32 --batch-size 512 --mean-queries 23 --num-active-queries 8 --repetitions 11
measure rest --dtype bfloat16 --batch-size 8 --batch-size 64 --form eager --form compiled --form optimized --compile-rivals \
    --repetitions 31
