#!/usr/bin/env bash
# The studies of docs/studies.md on the base of `mini`.
#
#   bash benchmarks/mini/studies.sh WORK [STEP...]
#
# WORK is a folder where train/mini/make.sh has made `base`, `encoder` and the datasets. Without any
# STEP all are run, in the order below. What is finished in WORK is not run again. make.sh also makes what two steps
# need: `curve` trains from WORK/averaged on the scores in WORK/*-larger-*.jsonl, `half-billion` from WORK/qwen.
set -euo pipefail
work=$1
steps=("${@:2}")
[ $# -gt 1 ] || steps=(base lora ablation lora-vs-full demos curve half-billion)
here=$(cd "$(dirname "$0")" && pwd)
cp "$here"/*.toml "$work"
export PYTHONPATH="$(realpath "$here/../..")"
cd "$work"

fit() { python -m train fit "$@" --bf16 --resume; }
study() { python -m benchmarks.studies "$1" study.toml -o studies --bf16 "${@:2}" | tee "study-$1.txt"; }

# Train 6-domains.toml with NUMBER of the written dialogues. They are taken at even distances, because the dialogues of
# a setting stand together. Without any, the recipe's paragraph about them is left out. Only written dialogues choose
# the epoch; the other validation data is measured once, at the end, because it takes as long as training.
curve() { # NUMBER
    local all
    all=$(wc -l < written-train.jsonl)
    awk -v n="$1" -v all="$all" 'int(NR * n / all) > int((NR - 1) * n / all)' written-train.jsonl > "written-$1.jsonl"
    sed "s/written-train/written-$1/" 6-domains.toml |
        awk -v RS= -v ORS='\n\n' '!/"written-0.jsonl"/ { if (!/written-valid/) sub(/valid/, "test"); print }' \
            > "curve-$1.toml"
    fit "curve-$1.toml" -o "curve-$1" --epochs 2 --set learning_rate=1.2e-4 --set demonstrations=0
}

for step in "${steps[@]}"; do
    case $step in
        base) fit study-base.toml -o study-base ;;
        lora) for seed in 42 43 44; do fit study-lora.toml -o "study-lora-$seed" --seed "$seed"; done ;;
        ablation) study ablation --fraction 0.1667 --epochs 3 ;;
        lora-vs-full) study lora-vs-full --fraction 0.125 --epochs 4 ;;
        demos) study demos --fraction 0.1667 --epochs 3 --set 'tasks=["emotion"]' ;;
        curve) for written in 0 250 500 1000; do curve "$written"; done ;;
        half-billion)
            python -m benchmarks.studies ablation study-qwen.toml -o studies-qwen --bf16 \
                --variant InstructERC --variant "without both" --variant "with demonstrations" |
                tee study-half-billion.txt ;;
        *) echo "no step $step" >&2; exit 2 ;;
    esac
done
