#!/usr/bin/env bash
# DeepSpeed's own launcher, one node. The arguments are train.py's:
#   RESUME=out RANKS=8 configs/deepspeed.sh --until 1000 --save out --save-every 100
# Run again, it goes on from the newest checkpoint in out that is whole.
# On several nodes: HOSTFILE=path, with lines "HOST slots=8". DeepSpeed reaches them by ssh; or, without ssh, on each:
#   HOSTFILE=path OPTIONS='--no_ssh --node_rank N --master_addr HOST --master_port PORT' configs/deepspeed.sh ...
# Without accelerators: DS_ACCELERATOR=cpu.
set -euo pipefail
here="$(cd "$(dirname "$0")" && pwd)"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
if [ -n "${HOSTFILE:-}" ]; then
    where=(--hostfile "$HOSTFILE")
else
    where=(--nproc-per-node "${RANKS:-2}")
fi
# shellcheck disable=SC2086 # OPTIONS are words
exec "${PYTHON:-python}" -m rankload run --launcher deepspeed "${where[@]}" ${RESUME:+--resume "$RESUME"} \
    ${OPTIONS:-} -- "$here/train.py" --config "${CONFIG:-$here/zero1.json}" "$@"
