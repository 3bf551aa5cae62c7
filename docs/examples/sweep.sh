#!/usr/bin/env bash
# Train with several learning rates one after the other, then compare them on held-out rollouts. Finished runs are skipped when
# the script is run again.
#
#   DATA=rollouts/train VAL=rollouts/val docs/examples/sweep.sh --model SmolLM2-135M/
set -euo pipefail
DATA="${DATA:-sample_data/train}" VAL="${VAL:-sample_data/val}" OUT="${OUT:-runs/sweep}" RATES="${RATES:-1e-3 2e-3 4e-3}"
[[ $# -gt 0 ]] || set -- --preset tiny

models=()
for rate in $RATES; do
    # Exit 5 means that this one diverged; go on with the others.
    critic-train fit --data "$DATA" --val-data "$VAL" --out "$OUT/lr-$rate" --lr "$rate" "$@" || [[ $? -eq 5 ]] || exit
    [[ -e "$OUT/lr-$rate/best" ]] && models+=(--model "$OUT/lr-$rate")
done
critic-train eval "${models[@]}" --data "$VAL"
