#!/bin/sh
# Tests and measurements that need a GPU, in the order of their worth; results as JSON in a folder, tables on the terminal.
#   benchmarks/on_a_gpu.sh FOLDER [STAGE...]      PYTHON names the interpreter; without stages, all
set -u
OUTPUT=${1:?Expected a folder for the results.}
shift
PYTHON=${PYTHON:-python}
mkdir -p "$OUTPUT"

measure() {
    NAME=$1
    shift
    "$PYTHON" benchmarks/inference.py --device cuda --json "$OUTPUT/$NAME.json" "$@"
}

for STAGE in ${*:-tests selection budgets float32 batches}; do
    case $STAGE in
    tests) "$PYTHON" -m pytest -q tests/modeling ;;
    selection) # beside a fixed K of the same mean, by each backend
        measure selection --dtype bfloat16 --batch-size 512 --batch-size 64 --num-active-queries 8 --repetitions 31 \
            --mean-queries 9 --mean-queries 23 --mean-queries 38 ;;
    budgets) # every K, beside timm's ViT
        measure budgets --dtype bfloat16 --batch-size 1 --batch-size 512 --form eager \
            --compile-rivals --repetitions 31 ;;
    float32)
        measure float32 --dtype float32 --batch-size 512 --mean-queries 23 --num-active-queries 8 --repetitions 11 ;;
    batches)
        measure batches --dtype bfloat16 --batch-size 8 --batch-size 64 --form eager --form compiled \
            --compile-rivals --repetitions 31 ;;
    *) echo "Expected stages among tests, selection, budgets, float32, batches, got $STAGE." >&2; exit 2 ;;
    esac
done
