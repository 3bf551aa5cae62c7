#!/usr/bin/env bash
# Pretrain a value model before PPO starts, as VC-PPO and VAPO do: rollouts of a fixed policy, Monte-Carlo returns, until the
# held-out explained variance stops rising; then a gate. Run it again after a preemption: each command resumes, or says that it
# is finished.
#
#   DATA=rollouts/train VAL=rollouts/val OUT=runs/pretrained docs/examples/pretrain.sh --model Qwen2.5-0.5B/ --precision bf16
set -euo pipefail
DATA="${DATA:-sample_data/train}" VAL="${VAL:-sample_data/val}" OUT="${OUT:-runs/pretrained}"
[[ $# -gt 0 ]] || set -- --preset tiny

# Exit 1 if rows cannot be used, or if held-out prompts are trained on.
critic-train check "$DATA" --against "$VAL"

# A constant learning rate and patience: how many steps are enough is not known in advance.
critic-train fit --data "$DATA" --val-data "$VAL" --out "$OUT" --returns mc --old-values none \
    --epochs 20 --lr-schedule constant --eval-every 8 --patience 6 "$@"

# Exit 1 unless it is better than a constant, with 95 % confidence.
critic-train eval --model "$OUT" --data "$VAL" --fail-under explained_variance_interval.low=0

# A critic that started from --model has that model's tokenizer beside it. verl loads one from there, unless it is told of another.
best="$(realpath "$OUT/best")"
if compgen -G "$best/tokenizer*" >/dev/null; then
    echo "for verl: critic.model.path=$best"
else
    echo "for verl: critic.model.path=$best critic.model.tokenizer_path=POLICY (there is no tokenizer beside this critic)"
fi
