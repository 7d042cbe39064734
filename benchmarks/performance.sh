#!/usr/bin/env bash
# One table of each kind on the performance page, one benchmark after another, and a page of them.
#
#   bash benchmarks/performance.sh WORK [DIALOGUES]
#
# DIALOGUES is a JSONL file to label (the labelled example by default). The other engines are
# where `bash benchmarks/peers/setup.sh WORK/peers` has put them; FAISS_PYTHON names a Python with
# faiss, if any. What WORK/results holds already is not measured again. The page is
# WORK/performance.md; to keep it: cp WORK/results/*.json docs/performance/, and
# python -m benchmarks.performance docs/performance docs/performance.md
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
dialogues=$(realpath "${2:-$root/examples/labelled_chat.jsonl}")
mkdir -p "$1/results"
cd "$1"
# The commands stand on the page: a name tells a reader more than a path of this machine.
input=$(basename "$dialogues")
cp "$dialogues" "$input"
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" PYTHONWARNINGS=ignore HF_HUB_OFFLINE=1

# run NAME MODULE [ARGUMENT...]: saves the last line that a benchmark prints, with its command.
run() {
    local name=$1 module=benchmarks.$2
    shift 2
    if [[ -s results/$name.json ]]; then return; fi
    echo "performance: $module $*" >&2
    python -m "$module" "$@" | tee "$name.log" >&2
    tail -n 1 "$name.log" | python -c '
import json, sys
print(json.dumps({"command": sys.argv[1], **json.load(sys.stdin)}, indent=1))
' "python -m $module${*:+ $*}" >"results/$name.json.part"
    mv "results/$name.json.part" "results/$name.json"
}

run machine machine
run throughput throughput . "$input"
run limit limit mini "$input"
run latency latency
run retrieval retrieval
run scaling scaling
run packed packed "$input"
run graph graph mini "$input"
python -m benchmarks.performance results performance.md
