#!/usr/bin/env bash
# Fine-tunes an encoder on CoLA (Corpus of Linguistic Acceptability) with AdamW, GaLore, LoRA and
# AdaRankGrad: four learning rates each, three seeds of the best, a table of Matthews correlations.
#   bash benchmarks/cola.sh MODEL DATA OUT
# MODEL is a Hugging Face directory, DATA the directory of the raw corpus (in_domain_train.tsv,
# in_domain_dev.tsv, out_of_domain_dev.tsv). Further arguments are passed to
# `python -m benchmarks.compare finetune` and override those below: --jobs 4 --seeds 0 1 2 3 4
set -euo pipefail

if (($# < 3)); then
    echo "cola: expected three directories: bash benchmarks/cola.sh MODEL DATA OUT" >&2
    exit 2
fi
model=$1 data=$2 out=$3
shift 3

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
export PATH=$root/.venv/bin:$PATH PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
exec python -m benchmarks.compare finetune --model "$model" --out "$out" --jobs 2 \
    --methods adamw galore lora finetuning --seeds 0 1 2 \
    --train "$data/in_domain_train.tsv" \
    --eval "$data/in_domain_dev.tsv" "$data/out_of_domain_dev.tsv" --text-key 4 --label-key 2 \
    --max-length 64 --batch-size 32 --epochs 3 --weight-decay 0.01 "$@"
