#!/usr/bin/env bash
# Success of a policy on the moving belt, and whether it still puts cubes on the plate; one file each, with every episode.
#   training/judge_belt.sh CHECKPOINT OUT [EPISODES]      (100 unseen seeds from 100,000; WORKERS: processes)
# What is there already is not run again; an interrupted result goes on after its last episode.
set -euo pipefail
cd "$(dirname "$0")/.."
checkpoint=${1:?name a checkpoint} out=${2:?name a folder for the results} episodes=${3:-100}
mkdir -p "$out"

judge() { # name of the result, task, further flags
  [ -e "$out/$1.json" ] || .venv/bin/qwen-vla eval run --checkpoint "$checkpoint" --embodiment widowx --task "$2" \
    --episodes "$episodes" --workers "${WORKERS:-$(nproc)}" --output "$out/$1.jsonl" --resume "${@:3}"
}

judge belt belt --execute-steps 5 --language               # 5 of 8 actions of each chunk, the world waits for the policy
judge belt_execute_2 belt                                  # as the robot's YAML says: 2 of 8
judge belt_late_100_ms belt --execute-steps 5 --latency-ms 100   # the world goes on, through the robot's own control law
judge place place
.venv/bin/python training/results.py "$out"
