#!/usr/bin/env bash
# One policy for ALOHA, WidowX and a mobile base, from nothing: demonstrations, stage 0, T2A, CPT, corrections, SFT, RL.
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
"$bin/qwen-vla" data t2a --count 4000 --out data/t2a --workers "$workers"

stage vision vision
stage grounding where vision
stage grounding requests where
stage t2a t2a requests
stage cpt cpt t2a

say "corrections: the expert takes over from what CPT has taught"
corrections() { demos "$1" "$2" "$3" "$4" --seed 20000 --pilot "$out/cpt/checkpoint"; }
corrections mobile_base all 300 rooms_corrections
corrections widowx place 600 widowx_corrections
corrections aloha pick 250 aloha_pick_corrections
corrections aloha transfer 200 aloha_transfer_corrections

stage sft sft cpt
say rl
"$bin/python" training/rl.py --recipe "$recipes/rl.yaml" --from "$out/sft/checkpoint" --out "$out/rl" --set "workers=$workers"
say "done: $out/rl/checkpoint"
"$bin/qwen-vla" train plot "$out" --out "$out/curves.png"
