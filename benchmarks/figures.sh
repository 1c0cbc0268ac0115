#!/usr/bin/env bash
# Measures the figures of README and docs anew, at one commit:
#   bash benchmarks/figures.sh OUT                  everything, in days on two cores
#   bash benchmarks/figures.sh OUT times network    some parts
# Parts: long, short, ablations, sketched (losses, which other work does not disturb), times, and
# network (as root), which want a quiet machine. Fine-tuning needs a model and data: cola.sh.
# The same command goes on where it was cut off.
set -euo pipefail

if (($# < 1)); then
    echo "figures: expected a directory: bash benchmarks/figures.sh OUT [PART ...]" >&2
    exit 2
fi
all=(long short ablations sketched times network)
parts=("${@:2}")
((${#parts[@]})) || parts=("${all[@]}")
for part in "${parts[@]}"; do
    if [[ " ${all[*]} " != *" $part "* ]]; then
        echo "figures: no part $part; choose of ${all[*]}" >&2
        exit 2
    fi
done
mkdir -p "$1"
out=$(cd -- "$1" && pwd)
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
export PATH=$PWD/.venv/bin:$PATH OMP_NUM_THREADS=1
headers=$(python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/torch/include

pretrain() { # pretrain FOLDER OPTION ...
    python -m benchmarks.compare pretrain --jobs 2 --out "$out/$1" "${@:2}"
}

# 12M tokens: rates from a tenth of the length, then two around the best
run_long() {
    local bf16=(--seq-len 256 --dtype bf16 --compile) python=(--data-bytes 60000000) job tenth full
    job=(--model nano --batch-size 16 "${bf16[@]}")
    tenth=(--steps 293 --warmup 29 --eval-every 97 --seeds 0)
    full=(--steps 2930 --warmup 293 --eval-every 146 --rest-lr 3.2e-2)
    pretrain tenth "${job[@]}" "${tenth[@]}" "${python[@]}" --rest-lr 1.6e-2 3.2e-2 6.4e-2 \
        --methods adamw muon recommended pretraining galore fira paper \
        --lrs adamw=1e-3,2e-3,4e-3 muon=5.6e-3,8e-3,1.2e-2 recommended=8e-3,1.2e-2,1.6e-2 \
        pretraining=5.6e-3,8e-3,1.2e-2 galore=1e-2,2e-2,4e-2 fira=2.5e-3,5e-3,1e-2 \
        paper=1.2e-2,2.4e-2,4.8e-2
    pretrain long "${job[@]}" "${full[@]}" "${python[@]}" --seeds 0 1 \
        --methods adamw muon recommended pretraining \
        --lrs adamw=1.4e-3,2e-3 muon=5.6e-3,8e-3 recommended=8e-3,1.2e-2 pretraining=8e-3,1.2e-2
    pretrain long-headers "${job[@]}" "${full[@]}" --data "$headers" --seeds 0 \
        --methods adamw muon recommended pretraining \
        --lrs adamw=1.4e-3 muon=5.6e-3 recommended=8e-3 pretraining=8e-3
    pretrain long-60m --model 60m --batch-size 32 --micro-batch 8 "${bf16[@]}" "${python[@]}" \
        --steps 366 --warmup 37 --eval-every 61 --seeds 0 \
        --rest-lr 3.2e-2 --methods adamw muon pretraining --lrs adamw=1e-3 muon=8e-3 pretraining=8e-3
}

short_job=(--steps 400 --warmup 40 --batch-size 8 --seq-len 128 --eval-every 100 --seeds 0 1 2)

# 0.4M tokens, all methods, rates around the best of earlier sweeps
run_short() {
    pretrain nano "${short_job[@]}" --model nano --rest-lr 3.2e-2 6.4e-2 \
        --methods recommended pretraining paper adamw muon galore apollo fira \
        --lrs recommended=1.2e-2,1.6e-2 pretraining=8e-3,1.2e-2 paper=1.2e-2,2.4e-2 \
        adamw=1e-3,2e-3 muon=8e-3,1.2e-2 galore=1e-2,2e-2 apollo=1e-2,2e-2 fira=5e-3,1e-2
    pretrain pico-headers "${short_job[@]}" --model pico --data "$headers" --rest-lr 1.6e-2 3.2e-2 \
        --methods recommended pretraining paper adamw muon galore \
        --lrs recommended=1.2e-2,2.4e-2 pretraining=8e-3,1.2e-2 paper=1.2e-2,2.4e-2 \
        adamw=2e-3,4e-3 muon=8e-3,1.2e-2 galore=1e-2,2e-2
}

# one setting changed at a time
run_ablations() {
    local lrs=() variants=() name
    variant() { # variant NAME LR SETTING ...
        variants+=(--variant "$1" recommended "${@:3}")
        lrs+=("$1=$2")
    }
    variant residual-none 2.4e-2 residual=none
    variant residual-none-scale-1 2.4e-2 residual=none scale=1
    variant residual-scaled 2.4e-2 residual=scaled
    variant residual-matched 2.4e-2 residual=matched
    for name in energy=0.5 energy=0.8 energy=0.9 min_rank=1 max_rank=0.125 hysteresis=0 \
        transport=paper transport=none min_gap=10 max_gap=50 min_gap=400 refresh_below=0 \
        power_passes=0 side=right polar_precision=bf16 polar_steps=3 matmul_precision=medium; do
        variant "${name/=/-}" 2.4e-2 "$name"
    done
    for name in 1 4 8 16; do
        variant "rank-$name" 2.4e-2 "min_rank=$name" "max_rank=$name"
    done
    variant scale-0.4 1.2e-2 scale=0.4
    for name in 0.5 0.7 0.9; do
        variant "momentum-$name" 1.6e-2 "residual_momentum=$name" energy=0.25 min_rank=1
    done
    for name in bf16 int8; do
        variant "$name" 2.4e-2 "state_dtype=$name" "full_rank_state=$name"
    done
    variant in-backward 2.4e-2 gradient_sync=sketch gradient_budget=100000 residual_sync_bits=4
    pretrain ablations "${short_job[@]}" --model pico --all-seeds --rest-lr 3.2e-2 \
        --methods recommended --lrs recommended=2.4e-2 "${lrs[@]}" "${variants[@]}"
}

run_sketched() {
    python -m benchmarks.sketched --out "$out/sketched" --seeds 0 1 2 --ways "whole" muon \
        "2 bits, 2 back" "2 bits, 2 back, bf16, rank 4" "1 bit, 2 back" none "whole, matched" \
        "1 bit, 2 back, matched"
}

run_times() {
    local one=(--threads 1)
    python -m benchmarks.step --models 350m 1b --ranks 128 256 "${one[@]}" --out "$out/step.json"
    python -m benchmarks.refresh --models 350m 1b --ranks 128 --methods recommended galore \
        "${one[@]}" --out "$out/refresh.json"
    python -m benchmarks.memory --model 60m --rank 128 "${one[@]}" --out "$out/memory.json"
    python -m benchmarks.scaling --model 60m --processes 1 2 4 --rank 128 "${one[@]}" \
        --out "$out/scaling.json"
    local model
    for model in nano 60m; do
        python -m benchmarks.batches --model "$model" --rounds 5 | tee "$out/batches-$model.md"
    done
    python -m benchmarks.overhead | tee "$out/overhead.md"
    python -m benchmarks.host_time --small 256 --rank 4 --world-size 8 64 1024 |
        tee "$out/host-time.md"
}

run_network() {
    python -m benchmarks.overlap --model 60m --rank 128 --engines fsdp2 ddp --threads 1 \
        --out "$out/overlap.json"
    python -m benchmarks.network --bandwidths 100M 1G unlimited --steps 20 --warmup-steps 3 \
        --batch-size 4 --out "$out/network" --methods ddp-adamw ddp-adamw-fp16 \
        ddp-adamw-powersgd ddp-adarankgrad sketch sketch-bf16 sketch-vote-bf16 sketch-none-bf16
    python -m benchmarks.network --bandwidths 100M 1G --steps 20 --warmup-steps 3 --batch-size 4 \
        --processes-per-host 2 --methods hsdp-adamw hsdp-adarankgrad hsdp-sketch --out "$out/hsdp"
}

for part in "${parts[@]}"; do
    "run_$part"
done
