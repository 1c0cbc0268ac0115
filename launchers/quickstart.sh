#!/usr/bin/env bash
# From a fresh machine with Python 3.11 to a trained model: installs the dependencies, then trains a
# 3M-parameter Llama on the installed Python source, on two processes with ZeRO-2.
# Further arguments go to launchers/train_lm.py, for instance: launchers/quickstart.sh --steps 1000
set -euo pipefail

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
"$root/launchers/setup_env.sh"
cd "$root"
export PATH=$root/.venv/bin:$PATH

processes=2
if ! nvidia-smi -L >/dev/null 2>&1; then
    export DS_ACCELERATOR=cpu
elif (($(nvidia-smi -L | wc -l) < processes)); then
    processes=1
fi
port=$(python -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')

# DeepSpeed's outer process would die of a signal and orphan its children, so it ignores them: the
# children receive Ctrl-C from the terminal, a SIGTERM from here, and it waits for their report.
(
    trap '' INT TERM
    exec deepspeed --log_level critical --num_gpus "$processes" --master_port "$port" \
        launchers/train_lm.py --deepspeed_config ds_configs/zero2.json \
        --model nano --batch-size 16 --seq-len 128 --steps 500 --warmup 50 --eval-every 50 \
        --out runs/quickstart "$@"
) &
deepspeed=$!
terminate_children='import psutil, sys
for child in psutil.Process(int(sys.argv[1])).children(): child.terminate()'
status=0 stopped=0
trap 'stopped=130' INT
trap 'stopped=143; python -c "$terminate_children" "$deepspeed"' TERM

while kill -0 "$deepspeed" 2>/dev/null; do
    # A signal interrupts `wait`, which returns the signal's code; the last code is the job's.
    wait "$deepspeed" && status=0 || status=$?
done
exit "$((stopped ? stopped : status))"
