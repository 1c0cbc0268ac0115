#!/usr/bin/env bash
# Runs the quickstart's job with AdaRankGrad and with AdamW, one after the other at four learning
# rates each, and prints a table of all eight. Further arguments go to launchers/quickstart.sh.
set -euo pipefail

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
runs=()

run() {
    local optimizer=$1 lr=$2
    shift 2
    runs+=("runs/sweep/$optimizer-$lr")
    bash launchers/quickstart.sh --optimizer "$optimizer" --lr "$lr" --out "${runs[-1]}" "$@"
}

for lr in 8e-3 1.6e-2 2.4e-2 4.8e-2; do run adarankgrad "$lr" "$@"; done
for lr in 5e-4 1e-3 2e-3 4e-3; do run adamw "$lr" "$@"; done
.venv/bin/python -m launchers.reporting compare "${runs[@]}" --out runs/sweep/compare.png
