#!/usr/bin/env bash
# torchrun, one node. RANKS is the number of its accelerators; the arguments are train.py's:
#   RESUME=out RANKS=8 configs/torchrun.sh --until 1000 --save out --save-every 100
# Run again, by hand or by --max-restarts, it goes on from the newest checkpoint in out that is whole.
# On several nodes, on each: OPTIONS='--nnodes 1:4 --max-restarts 3 --rdzv-backend c10d --rdzv-endpoint HOST:PORT'.
# Without accelerators: DS_ACCELERATOR=cpu.
set -euo pipefail
here="$(cd "$(dirname "$0")" && pwd)"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
# shellcheck disable=SC2086 # OPTIONS are words
exec "${PYTHON:-python}" -m rankload run --nproc-per-node "${RANKS:-2}" ${RESUME:+--resume "$RESUME"} \
    ${OPTIONS:---max-restarts 3} -- "$here/train.py" --config "${CONFIG:-$here/zero1.json}" "$@"
