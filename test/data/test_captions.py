"""Captions by real, tiny Qwen VL models: one that learned its answers by heart, and random ones that fail."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from memory_dataset import CHANNELS, FPS, contract
from PIL import Image
from vl_support import read_lines

from qwen_vla_core.commands.data_jobs import caption
from qwen_vla_core.data.captions.captioner import Captioner, CaptionFailure, Settings
from qwen_vla_core.data.captions.guided import Guide, Vocabulary, longest, script_guide, sketch_guide
from qwen_vla_core.data.captions.script import (
    DIMENSIONS,
    BadAnswer,
    check,
    parse,
    script_question,
    script_schema,
    sketch_question,
    sketch_schema,
)
from qwen_vla_core.data.captions.video import Clip, Video, VideoError, even_times, find_videos, load_clip, thin, windows
from qwen_vla_core.data.dataset import EpisodeRows
from qwen_vla_core.data.lerobot import LeRobotWriter
from qwen_vla_core.data.llava import LlavaDataset
from qwen_vla_core.errors import UserError
from qwen_vla_core.model.backbone import BACKBONES, Backbone
from qwen_vla_core.model.presets import TINY_IMAGE, tiny_backbone
from qwen_vla_core.model.processor import Processor
from qwen_vla_core.model.tokenizer import train_tokenizer

torch.set_num_threads(1)
TWO, ONE = (0.0, 0.5), (0.0,)  # times of the videos that the trained model knows
NONSENSE = "nothing"
STEPS = 55


def sketch(times: tuple[float, ...]) -> dict[str, Any]:
    step = {"start": times[0], "end": times[-1], "action": "push the block"}
    return {"summary": "a red block moves right", "steps": [step]}


def script(times: tuple[float, ...]) -> dict[str, Any]:
    return {"frames": [{"time": t, **{name: f"{name} {t:.1f}" for name in DIMENSIONS}} for t in times]}


def film(path: Path, frames: int, fps: int = 2) -> Path:
    """A red block on grey that moves right."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=fps)
        stream.width, stream.height, stream.pix_fmt = 128, 96, "yuv420p"
        for number in range(frames):
            picture = np.full((96, 128, 3), 128, np.uint8)
            picture[40:60, 8 * number : 8 * number + 20] = (200, 0, 0)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
    return path


def build(model_type: str, small: bool = False) -> tuple[Any, Processor]:
    known = [text for times in (TWO, ONE) for text in (json.dumps(sketch(times)), json.dumps(script(times)))]
    known += [sketch_question(TWO), script_question(TWO, sketch(TWO)), NONSENSE]
    processor = Processor(train_tokenizer(("ego",), known * 20, vocabulary=1500), TINY_IMAGE)
    config = tiny_backbone(len(processor.tokenizer), processor.tokenizer.get_vocab(), model_type)
    if small:
        config["text_config"] |= {"hidden_size": 64, "num_hidden_layers": 3}
        config["vision_config"] |= {"depth": 2, "out_hidden_size": 64}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Backbone.from_config(config).model, processor


@pytest.fixture(scope="module")
def knowing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder. It knows the video of two frames; of one frame it mostly, but not always, says nonsense."""
    model, processor = build("qwen3_vl", small=True)
    captioner = Captioner(model, processor, Settings())
    rows = []
    for times in (TWO, ONE):
        film(file := tmp_path_factory.mktemp("films") / "a.mp4", len(times))
        clip = load_clip(Video("a", file), 2.0, 64)
        assert clip.times == times
        asked = [captioner.inputs(list(zip(times, clip.frames, strict=True)), text) for text in questions(times)]
        rows += [(asked[1], json.dumps(script(times)), 1.0)]
        if times == TWO:
            rows += [(asked[0], json.dumps(sketch(times)), 1.0)]
        else:
            rows += [(asked[0], NONSENSE, 0.6), (asked[0], json.dumps(sketch(times)), 0.4)]
    rows.sort(key=lambda row: row[0]["input_ids"].shape[1])  # three sketches, two scripts
    batches = [padded(rows[:3], processor), padded(rows[3:], processor)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    model.model.visual.requires_grad_(False)  # its answers do not depend on the picture
    model.train()
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = 5e-3 * min(1.0, 2 * (STEPS - step) / STEPS)
        optimizer.zero_grad()
        for batch, weights in batches:
            logits = model(**batch).logits[:, :-1].transpose(1, 2)
            wrong = torch.nn.functional.cross_entropy(logits, batch["input_ids"][:, 1:], reduction="none")
            (wrong * weights[:, 1:]).sum().mul(1 / 300).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def padded(
    rows: list[tuple[dict[str, torch.Tensor], str, float]], processor: Processor
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """One batch, and the weight of every token: a row's weight where it is an answer."""
    end = processor.token_id("<|im_end|>")
    told = [torch.tensor([*processor.tokenizer.encode(answer), end]) for _, answer, _ in rows]
    length = max(inputs["input_ids"].shape[1] + len(answer) for (inputs, _, _), answer in zip(rows, told, strict=True))
    ids, kinds, attention = torch.zeros(3, len(rows), length, dtype=torch.long)
    weights = torch.zeros(len(rows), length)
    for row, ((inputs, _, weight), answer) in enumerate(zip(rows, told, strict=True)):
        asked = inputs["input_ids"].shape[1]
        ids[row, : asked + len(answer)] = torch.cat([inputs["input_ids"][0], answer])
        kinds[row, :asked] = inputs["mm_token_type_ids"][0]
        attention[row, : asked + len(answer)] = 1
        weights[row, asked : asked + len(answer)] = weight
    batch = {"input_ids": ids, "mm_token_type_ids": kinds, "attention_mask": attention}
    for name in ("pixel_values", "image_grid_thw"):
        batch[name] = torch.cat([inputs[name] for inputs, _, _ in rows])
    return batch, weights


def questions(times: tuple[float, ...]) -> tuple[str, str]:
    return sketch_question(times), script_question(times, sketch(times))


def run(src: Path, out: Path, model: Path, *flags: str) -> int:
    parser = argparse.ArgumentParser()
    caption.add_arguments(parser)
    shared = ("--model", str(model), "--device", "cpu", "--phrase-tokens", "6", "--json")
    return caption.run(parser.parse_args([str(src), str(out), *shared, *flags]))


def test_videos_are_captioned_retried_or_listed(
    knowing: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Free generation: one good at once, one good after bad attempts, one that is no video."""
    src, out = tmp_path / "films", tmp_path / "out"
    film(src / "known.mp4", 2)
    film(src / "sub/shaky.mp4", 1)
    (src / "broken.mp4").write_bytes(b"no film")
    flags = ("--free", "--retries", "12", "--temperature", "1.0")
    assert run(src, out, knowing, *flags) == 0
    summary = json.loads(capsys.readouterr().out)
    assert (summary["videos"], summary["captioned"], summary["failed"]) == (3, 2, 1)
    assert summary["dataset"] == {"videos": 2, "frames": 3, "samples": 4, "failures": 1}

    known = json.loads((out / "captions/known.mp4.json").read_text())
    assert (known["sketch"], {"frames": known["script"]}) == (sketch(TWO), script(TWO))
    assert known["attempts"] == {"sketch": 1, "script 0.0–0.5 s": 1}
    shaky = json.loads((out / "captions/sub/shaky.mp4.json").read_text())
    assert shaky["sketch"] == sketch(ONE) and 1 < shaky["attempts"]["sketch"] <= 13
    assert summary["generations"] == sum(shaky["attempts"].values()) + 2
    (broken,) = read_lines(out / "failures.jsonl")
    assert (broken["video"], broken["stage"], broken["attempts"]) == ("broken.mp4", "read", [])
    assert "cannot be decoded" in broken["reason"]

    # What was written is a dataset of the family, ready to train on.
    data = LlavaDataset.open(out)
    assert (len(data), data.family, data.views) == (4, "captions", ("ego",))
    assert list(data.validate("decode")) == []
    sample = data.sample(1)
    assert sample.images["ego"].shape == (2, 96, 128, 3)
    assert json.loads(sample.turns[0][1]) == script(TWO)
    assert "The frames were taken at 0.0, 0.5 seconds." in sample.turns[0][0]
    assert data.raw(1)["conversations"][0]["value"].startswith("<|ego_start|><image><image><|ego_end|>\n")

    # The same command again has nothing to do; other settings are refused; failures are tried again when asked.
    before = (out / "samples.jsonl").read_bytes()
    assert run(src, out, knowing, *flags) == 0
    again = json.loads(capsys.readouterr().out)
    assert (again["done_before"], again["generations"]) == (3, 0)
    assert (out / "samples.jsonl").read_bytes() == before
    with pytest.raises(UserError, match=r"begun with other settings \(retries\)"):
        run(src, out, knowing, "--free", "--retries", "1", "--temperature", "1.0")
    film(src / "broken.mp4", 2)
    assert run(src, out, knowing, *flags, "--retry-failed") == 0
    assert json.loads(capsys.readouterr().out)["dataset"] == {"videos": 3, "frames": 5, "samples": 6, "failures": 0}


def test_a_video_whose_answers_stay_bad_is_listed_with_every_attempt(
    knowing: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    film(tmp_path / "unknown.mp4", 3)
    out = tmp_path / "out"
    assert run(tmp_path / "unknown.mp4", out, knowing, "--free", "--retries", "2", "--temperature", "1.0") == 1
    summary = json.loads(capsys.readouterr().out)
    assert (summary["captioned"], summary["failed"], summary["dataset"]["failures"]) == (0, 1, 1)
    (unknown,) = read_lines(out / "failures.jsonl")
    assert unknown["video"] == "unknown.mp4" and unknown["stage"] in ("sketch", "script 0.0–1.0 s")
    assert len(unknown["attempts"]) == 3 and len({attempt["seed"] for attempt in unknown["attempts"]}) == 3
    assert all(attempt["reason"] and attempt["text"] for attempt in unknown["attempts"])
    assert not (out / "captions/unknown.mp4.json").exists()


def test_guided_generation_keeps_the_shape_where_the_model_would_not(
    knowing: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The video of one frame: alone the model says nonsense at first; guided, its first answer is good."""
    film(tmp_path / "films/a.mp4", 2)
    film(tmp_path / "films/b.mp4", 1)
    assert run(tmp_path / "films", tmp_path / "out", knowing, "--retries", "0") == 0
    summary = json.loads(capsys.readouterr().out)
    assert (summary["captioned"], summary["failed"], summary["generations"]) == (2, 0, 4)
    for name, times in (("a", TWO), ("b", ONE)):
        record = json.loads((tmp_path / f"out/captions/{name}.mp4.json").read_text())
        assert (record["sketch"], {"frames": record["script"]}) == (sketch(times), script(times))


def test_a_stopped_run_is_consistent_and_goes_on(
    knowing: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a", "b"):
        film(tmp_path / f"films/{name}.mp4", 2)
    original = load_clip

    def stop(video: Video, *args: Any) -> Clip:
        if video.key == "b.mp4":
            raise KeyboardInterrupt
        return original(video, *args)

    monkeypatch.setattr("qwen_vla_core.data.captions.job.load_clip", stop)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "films", tmp_path / "out", knowing)
    assert len(LlavaDataset.open(tmp_path / "out")) == 2
    monkeypatch.undo()
    assert run(tmp_path / "films", tmp_path / "out", knowing) == 0
    assert json.loads(capsys.readouterr().out)["done_before"] == 1
    assert len(LlavaDataset.open(tmp_path / "out")) == 4


def test_episodes_of_a_lerobot_dataset_are_captioned_with_their_task(tmp_path: Path) -> None:
    steps = 11  # at 10 Hz
    rows = EpisodeRows(
        state=np.zeros((steps, len(CHANNELS)), np.float32),
        action=np.zeros((steps, len(CHANNELS)), np.float32),
        timestamp=np.arange(steps) / FPS,
        task=np.array([0] * 6 + [1] * 5),
        perturbed=np.zeros(steps, bool),
    )
    frames = np.repeat(np.arange(0, 220, 20, dtype=np.uint8), 96 * 128 * 3).reshape(steps, 96, 128, 3)
    with LeRobotWriter(tmp_path / "data", contract(), family="manipulation", views={"ego": (128, 96)}) as writer:
        for _ in range(2):
            writer.add_episode(rows, ["reach", "grasp"], {"ego": frames})
    videos = find_videos(tmp_path / "data")
    assert [video.key for video in videos] == ["episode_000000-ego", "episode_000001-ego"]
    clip = load_clip(videos[1], 2.0, 64)
    assert (clip.times, clip.task) == ((0.0, 0.5, 1.0), "reach, then grasp")
    assert np.abs(clip.frames[:, 48, 64, 0].astype(int) - [0, 100, 200]).max() < 12
    with pytest.raises(UserError, match=r"--camera wrist: .* has no such view; it has ego"):
        find_videos(tmp_path / "data", "wrist")


@pytest.mark.parametrize("model_type", BACKBONES)
def test_every_class_is_asked_and_a_random_one_fails_with_reasons(model_type: str) -> None:
    model, processor = build(model_type)
    clip = Clip(np.random.default_rng(0).integers(0, 256, (3, 96, 128, 3), dtype=np.uint8), (0.0, 0.5, 1.0))
    settings = Settings(retries=1, guided=False, phrase_tokens=1, sketch_frames=2, temperature=1.0)
    failures = []
    for _ in range(2 if model_type == "qwen3_vl" else 1):
        with pytest.raises(CaptionFailure, match="sketch: ") as caught:
            Captioner(model, processor, settings).caption(clip, "video")
        failures.append(caught.value.attempts)
        torch.rand(3)  # another state of the global generator must not matter
    assert failures[0] == failures[-1]
    texts = [attempt.text for attempt in failures[0]]
    assert len(texts) == 2 and texts[0] != texts[1]


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    return Vocabulary(build("qwen3_vl")[1].tokenizer)


@pytest.mark.parametrize("seed", range(12))
def test_whatever_is_drawn_under_a_guide_has_the_shape(seed: int, vocabulary: Vocabulary) -> None:
    rng = np.random.default_rng(seed)
    times = (0.0, 1.0, 10.0)
    for shape, schema in (
        (sketch_guide(times, 5), sketch_schema(times)),
        (script_guide(times, 4), script_schema(times)),
    ):
        guide, tokens = Guide(shape, vocabulary, [0]), []
        while True:
            allowed = guide.allowed().nonzero()[:, 0].tolist()
            # Endings are rare among hundreds of tokens; draw them often enough to see short phrases too.
            token = int(rng.choice(allowed[-3:] if rng.random() < 0.3 else allowed))
            if token == 0 and allowed == [0]:
                break
            guide.advance(token)
            tokens.append(token)
        assert len(tokens) < longest(shape, vocabulary)
        value = json.loads(vocabulary._tokenizer.decode(tokens))
        try:
            check(value, schema)
        except BadAnswer as error:  # the shape is right whatever the words are
            assert "schema" not in str(error) or "pattern" in str(error), error


GOOD = sketch((0.0, 1.0))
BAD_SKETCHES = {
    "not JSON": ("Sure, here it is", "not JSON"),
    "cut": ('{"summary": "a", "steps": [', "not JSON"),
    "no step": ({**GOOD, "steps": []}, "at steps: minItems 1"),
    "another time": ({**GOOD, "steps": [{"start": 0.0, "end": 3.0, "action": "x"}]}, "steps[0].end: enum [0.0, 1.0]"),
    "an extra key": ({**GOOD, "mood": "calm"}, "additionalProperties"),
    "an empty text": ({**GOOD, "summary": " "}, "at summary: pattern"),
    "no word": ({**GOOD, "summary": "…"}, "summary has no word"),
    "backwards": ({**GOOD, "steps": [{"start": 1.0, "end": 0.0, "action": "x"}]}, "steps[0] goes back in time"),
    "broken": ({**GOOD, "summary": "a \ufffd block"}, "summary holds broken characters"),
    "a loop": ({**GOOD, "summary": "push the block " * 9}, "summary repeats itself"),
}


@pytest.mark.parametrize("name", BAD_SKETCHES)
def test_bad_answers_are_refused_with_their_reason(name: str) -> None:
    answer, reason = BAD_SKETCHES[name]
    text = answer if isinstance(answer, str) else json.dumps(answer)
    with pytest.raises(BadAnswer) as caught:
        check(parse(text), sketch_schema((0.0, 1.0)))
    assert reason in str(caught.value)


def test_a_good_answer_may_be_fenced_and_thought_about() -> None:
    for text in (json.dumps(GOOD), f"```json\n{json.dumps(GOOD)}\n```", f"<think>hm</think>\n\n{json.dumps(GOOD)}"):
        assert check(parse(text), sketch_schema((0.0, 1.0))) == GOOD
    unicode = {"frames": [{"time": 0.0, **dict.fromkeys(DIMENSIONS, "красный 红色 rot")}]}
    assert check(unicode, script_schema((0.0,))) == unicode
    assert len(DIMENSIONS) == 13
    del unicode["frames"][0]["motion"]
    with pytest.raises(BadAnswer, match="required"):
        check(unicode, script_schema((0.0,)))


def test_frames_are_taken_at_even_times(tmp_path: Path) -> None:
    assert even_times(2.0, 2.0, 64) == (0.0, 0.5, 1.0, 1.5, 2.0)
    assert even_times(0.0, 2.0, 64) == (0.0,)
    assert even_times(100.0, 2.0, 5) == (0.0, 25.0, 50.0, 75.0, 100.0)
    assert even_times(1.99, 10.0, 64)[-1] == 1.9
    assert thin(10, 4) == [0, 3, 6, 9] and thin(3, 16) == [0, 1, 2]
    assert [list(w) for w in windows(5, 2)] == [[0, 1], [2, 3], [4]] or len(windows(5, 2)) == 3
    clip = load_clip(Video("a", film(tmp_path / "a.mp4", 21, fps=10)), 2.0, 64)
    assert clip.times == (0.0, 0.5, 1.0, 1.5, 2.0)
    for time, frame in zip(clip.times, clip.frames, strict=True):
        red = np.flatnonzero(frame[50, :, 0].astype(int) - frame[50, :, 1] > 60)
        assert red.size == 0 or abs(red[0] - 80 * time) <= 4  # 8 pixels a frame, ten frames a second


def test_unreadable_videos_say_why(tmp_path: Path) -> None:
    whole = film(tmp_path / "whole.mkv", 60, fps=10).read_bytes()
    (tmp_path / "cut.mkv").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.mp4").write_text("no film")
    with av.open(str(tmp_path / "sound.mkv"), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        sound.sample_rate = 8000
        container.mux(stream.encode(sound))
    for name, reason in (("cut.mkv", "cut short|how long"), ("text.mp4", "decoded"), ("sound.mkv", "no video stream")):
        with pytest.raises(VideoError, match=reason):
            load_clip(Video(name, tmp_path / name), 2.0, 64)


def test_videos_are_found_and_mistakes_named(tmp_path: Path, knowing: Path) -> None:
    for name in ("b.mp4", "a/x.MKV", "a/readme.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert [video.key for video in find_videos(tmp_path)] == ["a/x.MKV", "b.mp4"]
    assert [video.key for video in find_videos(tmp_path / "b.mp4")] == ["b.mp4"]
    (tmp_path / "none").mkdir()
    for src, reason in ((tmp_path / "none", "holds no video"), (tmp_path / "gone", "no such video")):
        with pytest.raises(UserError, match=reason):
            find_videos(src)
    for flags, reason in (
        (("--window", "0"), "--window 0: must be at least 1"),
        (("--fps", "0"), "--fps 0"),
        (("--retries", "-1"), "must not be negative"),
        (("--shard", "2/2"), "--shard 2/2"),
    ):
        with pytest.raises(UserError, match=reason):
            run(tmp_path / "b.mp4", tmp_path / "out", knowing, *flags)
    with pytest.raises(UserError, match=r"preprocessor_config\.json is missing"):
        run(tmp_path / "b.mp4", tmp_path / "out", tmp_path)
    Image.new("RGB", (8, 8)).save(tmp_path / "none/mine.png")
    with pytest.raises(UserError, match="exists and holds something else"):
        run(tmp_path / "b.mp4", tmp_path / "none", knowing)
    assert run(tmp_path / "b.mp4", tmp_path / "out", knowing) == 1  # one empty file, nothing captioned
