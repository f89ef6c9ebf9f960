"""``qwen-vla data caption``: fine-grained captions of videos in two passes of a Qwen VL."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from qwen_vla_core.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Source, output, model and how to ask it."""
    parser.add_argument("src", type=Path, metavar="SRC", help="a video, a folder of videos, or a LeRobot dataset")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write; goes on where it stopped")
    parser.add_argument("--model", required=True, help="folder or hub name of any Qwen VL")
    parser.add_argument("--fps", type=float, default=2.0, help="frames per second of the script (default: 2)")
    parser.add_argument("--max-frames", type=int, default=64, help="most frames per video (default: 64)")
    parser.add_argument("--sketch-frames", type=int, default=16, help="most frames of the first pass (default: 16)")
    parser.add_argument("--window", type=int, default=8, help="frames per answer of the second pass (default: 8)")
    parser.add_argument("--phrase-tokens", type=int, default=32, help="most tokens of one phrase (default: 32)")
    parser.add_argument("--retries", type=int, default=3, help="attempts after a bad answer (default: 3)")
    parser.add_argument("--temperature", type=float, default=0.7, help="of those attempts (default: 0.7)")
    parser.add_argument("--seed", type=int, default=0, help="of those attempts (default: 0)")
    parser.add_argument("--free", action="store_true", help="let the model write the JSON's shape by itself")
    parser.add_argument("--pixels", type=int, help="area every frame is brought to (default: the model's limits)")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default: auto)")
    parser.add_argument("--camera", help="view of a LeRobot dataset (default: its first)")
    parser.add_argument("--view", default="ego", help="view tokens around the frames in OUT (default: ego)")
    parser.add_argument("--limit", type=int, help="only the first so many videos")
    parser.add_argument("--shard", default="0/1", metavar="I/N", help="every N-th video, for several processes")
    parser.add_argument("--retry-failed", action="store_true", help="also try videos that failed before")
    parser.add_argument("--json", action="store_true", help="machine-readable report on stdout")


def run(args: argparse.Namespace) -> int:
    """Captions; 1 if videos were tried and none of them worked."""
    for name in ("max_frames", "sketch_frames", "window", "phrase_tokens"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)}: must be at least 1")
    if args.fps <= 0 or args.fps > 10:
        raise UserError(f"--fps {args.fps:g}: between 0 and 10, times are written in tenths of a second")
    if args.retries < 0 or args.temperature < 0:
        raise UserError("--retries and --temperature: must not be negative")
    shard, shards = _shard(args.shard)

    from qwen_vla_core.data.captions.captioner import Captioner, Settings
    from qwen_vla_core.data.captions.job import FAILURES_FILE, Job, caption_all
    from qwen_vla_core.data.captions.video import find_videos
    from qwen_vla_core.model.device import choose_device

    videos = find_videos(args.src, args.camera)[: args.limit][shard::shards]
    device, dtype = choose_device(args.device)
    settings = Settings(
        sketch_frames=args.sketch_frames,
        window=args.window,
        retries=args.retries,
        temperature=args.temperature,
        seed=args.seed,
        guided=not args.free,
        phrase_tokens=args.phrase_tokens,
    )
    captioner = Captioner.from_pretrained(args.model, settings, device, dtype, args.pixels)
    job = Job(args.out, args.fps, args.max_frames, args.view, args.retry_failed)
    summary = caption_all(job, captioner, args.model, videos)
    if args.json:
        print(json.dumps(summary, indent=2, ensure_ascii=False))
    else:
        made, total = summary["captioned"], summary["dataset"]
        print(
            f"{args.out}: {made} videos captioned, {summary['failed']} failed, {summary['done_before']} done before; "
            f"the dataset holds {total['videos']} videos, {total['frames']} frames, {total['samples']} conversations"
        )
        if total["failures"]:
            print(f"{args.out / FAILURES_FILE}: {total['failures']} videos with the reason of each")
    return 1 if summary["failed"] and not summary["captioned"] else 0


def _shard(text: str) -> tuple[int, int]:
    first, _, second = text.partition("/")
    if not (first.isdigit() and second.isdigit() and int(first) < int(second)):
        raise UserError(f"--shard {text}: I/N with 0 ≤ I < N, for example 0/4")
    return int(first), int(second)
