#!/usr/bin/env bash
# One node. RANKS is the number of its accelerators; the arguments are train.py's:
#   RANKS=8 configs/torchrun.sh --steps 100 --save out
#   RANKS=8 configs/torchrun.sh --steps 100 --load out
# On several nodes, take --standalone away and give --nnodes, --rdzv-backend c10d and --rdzv-endpoint HOST:PORT.
# Without accelerators: DS_ACCELERATOR=cpu.
set -euo pipefail
here="$(cd "$(dirname "$0")" && pwd)"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec "${PYTHON:-python}" -m torch.distributed.run --standalone --nproc-per-node "${RANKS:-2}" \
    "$here/train.py" --config "${CONFIG:-$here/zero1.json}" "$@"
