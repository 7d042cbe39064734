#!/usr/bin/env bash
# The slow checks behind docs/reliability.md, one after another; about three hours on two cores.
#
#   bash tests/slow/reliability.sh DIALOGUES [BUNDLE]
#
# In DIALOGUES, a JSONL file, persuasion and neighbours are measured; BUNDLE is what mutants are made
# of and what the long run labels with (the one in the package; a tiny one is quicker).
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
dialogues=$(realpath "$1") bundle=${2:-mini}
if [[ -d $bundle ]]; then bundle=$(realpath "$bundle"); fi
cd "$root"
python -m tests.slow.kill_loop 1000
python -m tests.slow.mutants 10000 --bundle "$bundle"
python -m tests.slow.fuzz utterances 300000
for kind in records journal manifest; do python -m tests.slow.fuzz "$kind" 1800; done
work=$(mktemp -d)
python -m benchmarks.soak "$work" --dialogues 1000000 --bundle "$bundle" --kills 20
rm -r "$work"
python -m benchmarks.persuasion "$dialogues"
python -m benchmarks.neighbours "$dialogues" --demos 0
python -m benchmarks.neighbours "$dialogues" --demos 2 --trials 60
python -m benchmarks.neighbours "$dialogues" --demos 0 --pack-tokens 2048
