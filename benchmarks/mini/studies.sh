#!/usr/bin/env bash
# The studies of docs/results.md on the base of `mini`.
#
#   bash benchmarks/mini/studies.sh WORK
#
# WORK is a folder where train/mini/make.sh has made `base`, `encoder` and the datasets. What is
# finished there is not run again.
set -euo pipefail
work=$1
here=$(cd "$(dirname "$0")" && pwd)
cp "$here"/*.toml "$work"
export PYTHONPATH="$(realpath "$here/../..")"
cd "$work"

fit() { python -m train fit "$@" --bf16 --resume; }
study() { python -m benchmarks.studies "$1" study.toml -o studies --bf16 "${@:2}" | tee "study-$1.txt"; }

fit study-base.toml -o study-base
for seed in 42 43 44; do
    fit study-lora.toml -o "study-lora-$seed" --seed "$seed"
done
study ablation --fraction 0.1667 --epochs 3
study lora-vs-full --fraction 0.125 --epochs 4
study demos --fraction 0.0625 --epochs 2
