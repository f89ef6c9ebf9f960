#!/usr/bin/env bash
# From the generalist to a policy that also picks cubes off the moving belt: demonstrations, SFT, what it achieves.
#   training/belt.sh [OUT]                  (OUT: runs/belt; data goes to data/, needs data/widowx_place of generalist.sh)
# Every step goes on where it was interrupted, and is skipped once it is done. WORKERS: processes that record and judge.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-runs/belt}
bin=.venv/bin
workers=${WORKERS:-$(nproc)}
export OMP_NUM_THREADS=1

"$bin/qwen-vla" sim demos --embodiment widowx --task belt --episodes 900 --noise 0.7 --out data/belt_pick --workers "$workers"
"$bin/python" training/sft.py --recipe training/recipes/belt.yaml --from generalist --out "$out/sft"
training/judge_belt.sh "$out/sft/checkpoint" "$out/results"
