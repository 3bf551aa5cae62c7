#!/usr/bin/env bash
# The loop: train a critic, have it write fresh values and returns into the rollouts, train the next one on those, judge.
#
#   docs/examples/loop.sh TRAIN HELD_OUT OUT [FLAGS OF fit]
#
# as in docs/examples/loop.sh sample_data/train sample_data/val runs/loop --preset tiny
# Run again after an interruption, it goes on: every command finds what it has done.
set -euo pipefail
train=$1 held_out=$2 out=$3
shift 3

# A first critic, towards the rewards themselves: no values are needed.
critic-train fit --data "$train" --val-data "$held_out" --returns mc --old-values none --out "$out/first" "$@"

# Its values, and lambda-returns and the policy's advantages made of them, in the place of the old ones.
critic-train predict --model "$out/first" --data "$train" --to "$out/rollouts/train" \
    --returns gae --lam 0.95 --write values --write returns --write advantages

# The next critic, from the first one, clipped around its values, towards its lambda-returns.
critic-train fit --model "$out/first" --data "$out/rollouts/train" --val-data "$held_out" --out "$out/second" \
    --epochs 1 --lr 3e-4

# Both beside the stored values, against what was earned.
critic-train eval --model "$out/first" --model "$out/second" --data "$held_out" --returns mc
