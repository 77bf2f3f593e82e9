#!/bin/sh
# Train on NODES nodes of GPUS devices each; run it on every node. RDZV is the first node's host:port.
set -eu
NODES="${NODES:-1}" GPUS="${GPUS:-8}" RDZV="${RDZV:-localhost:29500}" OUT="${OUT:-run}" DATA="${DATA:-shards}"
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 # a restart must not find the addresses of the dead
# accumulate: micro-batches of a step in the whole world, a multiple of the data ranks (NODES x GPUS / (cp x pp)).
exec torchrun --nnodes "$NODES" --nproc-per-node "$GPUS" --rdzv-backend c10d --rdzv-endpoint "$RDZV" --rdzv-id "${ID:-pelagos}" \
    --max-restarts "${RESTARTS:-20}" --log-dir "$OUT/logs" --redirects 3 --tee 3 --local-ranks-filter 0 \
    -m pelagos train --model "${MODEL:-nano}" --data "$DATA" --out "$OUT" --steps "${STEPS:-3300}" \
    --set accumulate="${ACCUMULATE:-$((NODES * GPUS))}" --set ep="${EP:-$GPUS}" --set waves="${WAVES:-2}" "$@"
