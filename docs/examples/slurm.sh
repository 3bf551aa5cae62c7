#!/usr/bin/env bash
#SBATCH --job-name=critic
#SBATCH --nodes=1
#SBATCH --gres=gpu:8
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --signal=B:TERM@120
#SBATCH --open-mode=append
# One node of a Slurm cluster. Two minutes before the time is up, or when the job is preempted, the run gets SIGTERM, writes a
# checkpoint and ends with 143; the job is then queued again, and the same command resumes from there.
set -uo pipefail
DATA="${DATA:-rollouts/train}" VAL="${VAL:-rollouts/val}" MODEL="${MODEL:-base/}" OUT="${OUT:-runs/critic}"

critic-train fit --data "$DATA" --val-data "$VAL" --model "$MODEL" --out "$OUT" --precision bf16 --nproc "${SLURM_GPUS_ON_NODE:-1}" &
fit=$!
# The batch shell gets the signal: `wait` returns at once, and is called once more to wait for the end of the run.
trap 'kill -TERM "$fit"' TERM
wait "$fit"
code=$?
[[ "$code" -gt 128 ]] && { wait "$fit"; code=$?; }

if [[ "$code" -eq 143 ]]; then
    scontrol requeue "$SLURM_JOB_ID"
elif [[ "$code" -eq 0 ]]; then
    critic-train eval --model "$OUT" --data "$VAL" --json > "$OUT/held_out.json"
fi
exit "$code"
