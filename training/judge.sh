#!/usr/bin/env bash
# Every success rate that is said of a generalist, one file each, with every episode in it.
#   training/judge.sh CHECKPOINT OUT [EPISODES]      (100 unseen seeds from 100,000; WORKERS: processes, default: cores)
# What is there already is not run again; an interrupted result goes on after its last episode.
set -euo pipefail
cd "$(dirname "$0")/.."
checkpoint=${1:?name a checkpoint} out=${2:?name a folder for the results} episodes=${3:-100}
workers=${WORKERS:-$(nproc)}
mkdir -p "$out"

judge() { # name of the result, embodiment, task, episodes, further flags
  .venv/bin/qwen-vla eval run --checkpoint "$checkpoint" --embodiment "$2" --task "$3" \
    --episodes "$4" --workers "$workers" --output "$out/$1.jsonl" --resume "${@:5}"
}

judge aloha_pick aloha pick "$episodes" --language
judge aloha_transfer aloha transfer "$episodes"
judge widowx_place widowx place "$episodes" --language
judge rooms mobile_base all "$episodes" --language
# The prompt speaks of another robot than the one that is driven.
judge aloha_pick_told_widowx aloha pick $((episodes / 2)) --told widowx
judge widowx_place_told_mobile_base widowx place $((episodes / 2)) --told mobile_base
judge rooms_told_aloha mobile_base all $((episodes / 2)) --told aloha
.venv/bin/python training/results.py "$out"
