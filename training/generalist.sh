#!/usr/bin/env bash
# One policy for ALOHA, WidowX and a mobile base, from nothing: demonstrations, stage 0, T2A, CPT, SFT with corrections, RL.
#   training/generalist.sh [OUT]            (OUT: runs/generalist; data goes to data/)
# Every step goes on where it was interrupted, and is skipped once it is done. PROCESSES: training processes (default: one
# per CUDA device, else one per core, at most 4); WORKERS: processes that record demonstrations (default: cores).
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-runs/generalist}
bin=.venv/bin
recipes=training/recipes/generalist
cores=$(nproc)
export OMP_NUM_THREADS=1  # nproc obeys it, so the cores are counted before
workers=${WORKERS:-$cores}
devices=$("$bin/python" -c 'import torch; print(torch.cuda.device_count())')
processes=${PROCESSES:-$(( devices > 0 ? devices : (cores < 4 ? cores : 4) ))}

say() { printf '\n== %s (%d min)\n' "$1" $((SECONDS / 60)); }
demos() { # embodiment, task, episodes, folder, further flags
  "$bin/qwen-vla" sim demos --embodiment "$1" --task "$2" --episodes "$3" --out "data/$4" --workers "$workers" "${@:5}"
}
stage() { # page, name of the recipe, stage it goes on from (if any)
  say "$2"
  "$bin/python" -m torch.distributed.run --standalone --nproc_per_node "$processes" "training/$1.py" \
    --recipe "$recipes/$2.yaml" --out "$out/$2" ${3:+--from "$out/$3/checkpoint"}
}

say "demonstrations"
demos mobile_base all 1500 rooms_all --noise 0.7
demos widowx place 1500 widowx_place --noise 0.7
demos aloha pick 1200 aloha_pick --noise 0.7
demos aloha transfer 900 aloha_transfer --noise 0.7
demos aloha transfer 500 aloha_transfer_drops --noise 1 --drops 0.5 --seed 60000
"$bin/qwen-vla" data t2a --count 4000 --out data/t2a --workers "$workers"

stage vision vision
stage grounding where vision
stage grounding requests where
stage t2a t2a requests
stage cpt cpt t2a

corrections() { # stage whose policy drives first, first seed, ending of the folders, episodes of each world
  say "corrections: the expert takes over from $1"
  local pilot=(--seed "$2" --pilot "$out/$1/checkpoint")
  demos mobile_base all "$4" "rooms_corrections$3" "${pilot[@]}"
  demos widowx place "$5" "widowx_corrections$3" "${pilot[@]}"
  demos aloha pick "$6" "aloha_pick_corrections$3" "${pilot[@]}"
  demos aloha transfer "$7" "aloha_transfer_corrections$3" "${pilot[@]}"
}
corrections cpt 20000 "" 300 600 250 200
stage sft sft_first cpt
corrections sft_first 30000 _2 300 300 300 250
stage sft sft sft_first
corrections sft 40000 _3 700 150 350 450
stage sft sft_last sft

say rl
"$bin/python" training/rl.py --recipe "$recipes/rl.yaml" --from "$out/sft_last/checkpoint" --out "$out/rl" --set "workers=$workers"
say "done: $out/rl/checkpoint"
"$bin/qwen-vla" train plot "$out" --out "$out/curves.png"
