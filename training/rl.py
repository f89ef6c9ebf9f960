#!/usr/bin/env python3
"""Reinforcement learning (stage IV): a fine-tuned policy practises in simulation and keeps what works [P].

frozen    the backbone, unless it is given a rate [O]; the action decoder and a new value head learn
data      its own episodes: 128 worlds × 8 episodes of up to 8 chunks per iteration [P], in processes or Ray actors;
          reward 1 for the chunk that brings success, else 0 [P]
sampling  Flow-SDE: one random denoising step of each chunk is stochastic [P], a = 0.5 [X]
loss      PPO, clip 0.2, on the log-probability of a chunk (fp32, executed steps × real channels) with advantages by GAE
          (γ 0.99, λ 0.95) + 1.0 × clipped squared error of the value: linear on the mean of the backbone's hidden
          states, behind a stop-gradient [P]
schedule  AdamW, constant rates 5e-6 (decoder) and 1e-4 (value), 4 passes over every iteration's decisions [P]

    python training/rl.py --recipe training/recipes/rl/aloha.yaml --out runs/rl
    RAY_ADDRESS=… python training/rl.py --recipe … --out … --ray             # worlds on the nodes of a Ray cluster
"""

from __future__ import annotations

from qwen_vla_core.training.rl_page import main

if __name__ == "__main__":
    raise SystemExit(main(__doc__ or ""))
