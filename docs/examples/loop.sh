#!/usr/bin/env bash
# The loop: train a critic, write its values, returns and advantages into the rollouts, train the next critic on those,
# evaluate both. Run it again after a preemption: each command resumes, or says that it is finished.
#
#   DATA=rollouts/train VAL=rollouts/val OUT=runs/loop docs/examples/loop.sh --model Qwen2.5-0.5B/ --precision bf16
set -euo pipefail
DATA="${DATA:-sample_data/train}" VAL="${VAL:-sample_data/val}" OUT="${OUT:-runs/loop}"
[[ $# -gt 0 ]] || set -- --preset tiny

# On Monte-Carlo returns of the rewards: the shards need neither values nor returns.
critic-train fit --data "$DATA" --val-data "$VAL" --out "$OUT/first" --returns mc --old-values none "$@"

# Its values, the lambda-returns computed from them, and the advantages that a policy would be trained with.
critic-train predict --model "$OUT/first" --data "$DATA" --to "$OUT/rollouts" --returns gae --lam 0.95 \
    --write values --write returns --write advantages

# The next iteration: starting from the first critic, clipped around its values, trained on its lambda-returns.
critic-train fit --model "$OUT/first" --data "$OUT/rollouts" --val-data "$VAL" --out "$OUT/second" --epochs 1 --lr 3e-4

# Both critics and the values stored with the rollouts, against the Monte-Carlo returns.
critic-train eval --model "$OUT/first" --model "$OUT/second" --data "$VAL" --returns mc
