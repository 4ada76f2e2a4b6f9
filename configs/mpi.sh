#!/usr/bin/env bash
# mpirun, of Open MPI or MPICH. The arguments are train.py's:
#   RESUME=out RANKS=8 configs/mpi.sh --until 1000 --save out --save-every 100
# Run again, it goes on from the newest checkpoint in out that is whole. RANKS are those of each node.
# On several nodes: OPTIONS='--host a:8,b:8'. Open MPI binds each rank to one core unless it has '--bind-to none'.
# Without accelerators: DS_ACCELERATOR=cpu.
set -euo pipefail
here="$(cd "$(dirname "$0")" && pwd)"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
# shellcheck disable=SC2086 # OPTIONS are words
exec "${PYTHON:-python}" -m rankload run --launcher mpi --nproc-per-node "${RANKS:-2}" \
    ${RESUME:+--resume "$RESUME"} ${OPTIONS:-} -- "$here/train.py" --config "${CONFIG:-$here/zero1.json}" "$@"
