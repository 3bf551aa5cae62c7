#!/usr/bin/env bash
# The loop: train a critic, have it write fresh values, returns and advantages into the rollouts, train the next critic on those,
# judge both. Run it again after a preemption: each command goes on where it was, or says that it is done.
#
#   DATA=rollouts/train VAL=rollouts/val OUT=runs/loop docs/examples/loop.sh --model Qwen2.5-0.5B/ --precision bf16
set -euo pipefail
DATA="${DATA:-sample_data/train}" VAL="${VAL:-sample_data/val}" OUT="${OUT:-runs/loop}"
[[ $# -gt 0 ]] || set -- --preset tiny

# Towards what was earned: no values are needed, nor returns.
critic-train fit --data "$DATA" --val-data "$VAL" --out "$OUT/first" --returns mc --old-values none "$@"

# Its values, lambda-returns made of them, and the advantages a policy would be trained with.
critic-train predict --model "$OUT/first" --data "$DATA" --to "$OUT/rollouts" --returns gae --lam 0.95 \
    --write values --write returns --write advantages

# The next iteration: from the first critic, clipped around its values, towards its lambda-returns.
critic-train fit --model "$OUT/first" --data "$OUT/rollouts" --val-data "$VAL" --out "$OUT/second" --epochs 1 --lr 3e-4

# Both beside the values that came with the rollouts, against what was earned.
critic-train eval --model "$OUT/first" --model "$OUT/second" --data "$VAL" --returns mc
