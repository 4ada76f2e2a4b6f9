#!/usr/bin/env bash
# DeepSpeed's own launcher, one node. The arguments are train.py's:
#   RANKS=8 configs/deepspeed.sh --steps 100 --save out
#   RANKS=8 configs/deepspeed.sh --steps 100 --load out
# On several nodes: HOSTFILE=path, with lines "HOST slots=8"; DeepSpeed then reaches them by ssh.
# Without accelerators: DS_ACCELERATOR=cpu.
set -euo pipefail
here="$(cd "$(dirname "$0")" && pwd)"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
if [ -n "${HOSTFILE:-}" ]; then
    where=(--hostfile "$HOSTFILE")
else
    where=(--num_gpus "${RANKS:-2}" --master_port "${MASTER_PORT:-29500}")
fi
exec "${DEEPSPEED:-deepspeed}" "${where[@]}" \
    "$here/train.py" --config "${CONFIG:-$here/zero1.json}" "$@"
