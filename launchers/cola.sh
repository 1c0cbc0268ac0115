#!/usr/bin/env bash
# AdaRankGrad and AdamW on CoLA (Corpus of Linguistic Acceptability): four learning rates each, three
# seeds of the best, and a table of Matthews correlations.
#   bash launchers/cola.sh MODEL DATA OUT
# MODEL is a Hugging Face directory, DATA that of the raw corpus (in_domain_train.tsv,
# in_domain_dev.tsv, out_of_domain_dev.tsv). Further arguments go to launchers/finetune_sweep.py and
# overrule what is given here, for instance: --jobs 4 --seeds 0 1 2 3 4
set -euo pipefail

if (($# < 3)); then
    echo "cola: three directories are needed: bash launchers/cola.sh MODEL DATA OUT" >&2
    exit 2
fi
model=$1 data=$2 out=$3
shift 3

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
export PATH=$root/.venv/bin:$PATH
exec python "$root/launchers/finetune_sweep.py" --out "$out" --jobs 2 \
    --adarankgrad-lr 2.5e-5 5e-5 1e-4 2e-4 --adamw-lr 2.5e-5 5e-5 1e-4 2e-4 --seeds 0 1 2 \
    --set max_rank=72 --set energy=0.99 --set max_gap=50 --set scale=4 "$@" -- \
    --model "$model" --task classification --train "$data/in_domain_train.tsv" \
    --eval "$data/in_domain_dev.tsv" "$data/out_of_domain_dev.tsv" --text-key 4 --label-key 2 \
    --max-length 64 --batch-size 32 --epochs 3 --weight-decay 0.01 --group-by-length
