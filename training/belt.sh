#!/usr/bin/env bash
# From the generalist to a policy that also picks cubes off the moving belt: demonstrations, SFT, corrections, what it achieves.
#   training/belt.sh [OUT]           (OUT: runs/belt; data goes to data/; needs widowx_place and widowx_corrections_2 there,
#                                     which training/generalist.sh records)
# Every step goes on where it was interrupted, and is skipped once it is done. WORKERS: processes that record and judge.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-runs/belt}
bin=.venv/bin
export WORKERS=${WORKERS:-$(nproc)}
export OMP_NUM_THREADS=1

demos() { # folder, episodes, first seed, further flags
  "$bin/qwen-vla" sim demos --embodiment widowx --task belt --out "data/$1" --episodes "$2" --seed "$3" \
    --workers "$WORKERS" "${@:4}"
}
stage() { # name of the recipe, folder of the run, what it goes on from
  "$bin/python" training/sft.py --recipe "training/recipes/$1.yaml" --out "$out/$2" --from "$3"
}

demos belt_pick 900 0 --noise 0.7
demos belt_pick_2 600 5000 --noise 0.7
stage belt_first first generalist
demos belt_corrections 300 20000 --pilot "$out/first/checkpoint"
stage belt_second second "$out/first/checkpoint"
demos belt_corrections_2 400 30000 --pilot "$out/second/checkpoint"
stage belt last "$out/second/checkpoint"
training/judge_belt.sh "$out/last/checkpoint" "$out/results"
