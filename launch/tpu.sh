#!/usr/bin/env bash
# Runs train.py on every host of a TPU slice, and again after a lost host:
#   TPU=my-slice ZONE=us-east5-a launch/tpu.sh --config=configs/moe_16b.py --workdir=/mnt/runs/16b [--config...]
# PROJECT is gcloud's default if not given. DIR (default: dsv3) is this repository on every host, with its
# environment in DIR/.venv; the folder of --workdir is one that all hosts mount, such as Filestore.
# The hosts find each other through the slice's own metadata: no flags are needed.
set -euo pipefail

: "${TPU:?name the TPU slice: TPU=NAME}"
: "${ZONE:?name its zone: ZONE=us-east5-a}"
attempts=${ATTEMPTS:-3}
arguments=$(printf ' %q' "$@")

for attempt in $(seq "$attempts"); do
  code=0
  gcloud compute tpus tpu-vm ssh "$TPU" --zone="$ZONE" ${PROJECT:+--project="$PROJECT"} --worker=all \
    --command="cd ${DIR:-dsv3} && exec .venv/bin/python train.py$arguments" || code=$?
  # Done, stopped by hand, or what would fail again (see train.py).
  case $code in 0 | 2 | 3 | 130) exit "$code" ;; esac
  echo "attempt $attempt of $attempts ended with exit code $code" >&2
  sleep "${PAUSE:-10}"
done
exit "$code"
