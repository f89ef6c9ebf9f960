"""The tiny preset's own tokenizer: byte-level BPE with Qwen's splitting rule, trained on the project's own sentences.

Deterministic: the same texts give the same vocabulary. Qwen's rule splits numbers into digits, so every digit is one
token; colours and the words of prompts and answers become single tokens because they are frequent in the corpus.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, Qwen2Tokenizer
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)

# ChatML, the part of Qwen's template that all its models share.
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

COLOURS = ("red", "green", "blue", "yellow", "orange", "purple", "black", "white", "grey", "brown")


# The words of the published sentence that are the same for every robot, one token each: they say nothing that tells one
# observation from another, and a tiny model's time goes into its tokens (104 → 82 in ALOHA's prompt with its pictures).
PHRASES = (
    "user\n",
    "assistant\n",
    "The robot is",
    " with single arm",
    " with dual arms",
    " with no arm",
    " with mobile base",
    ", waist",
    ", and mobile base",
    ". The control frequency is",
    " Hz. Please predict the next",
    " control actions",
    " waypoints (forward, left and heading change from the current pose)",
    " to execute the following task:",
)


def project_corpus(robots: Sequence[str] = ()) -> list[str]:
    """Sentences in the project's own words: the published prompt, instructions, grounding questions and answers.

    Args:
        robots: tags of those that the prompts will name.
    """
    prompt = (
        "The robot is {} with {}{}. The control frequency is {} Hz. Please predict the next {} control actions to "
        "execute the following task: {}."
    )
    tasks = [f"pick up the {colour} cube" for colour in COLOURS]
    tasks += [f"transfer the {colour} cube to the other arm" for colour in COLOURS]
    tasks += [f"put the {colour} cube on the plate" for colour in COLOURS]
    tasks += ["go to the door", "stop", "move forward", "turn left", "turn right"]
    arms = ("single arm", "dual arms")
    bodies = ("", ", waist", ", and mobile base", ", waist, and mobile base")
    text = [
        prompt.format(robot, arms[i % 2], bodies[i % 4], 10 + i, 8 + i, task)
        for robot in (*robots, "a robot")
        for i, task in enumerate(tasks)
    ]
    for colour in COLOURS:
        text += [
            f"Where is the {colour} cube?",
            f"Where is the {colour} cube in the left wrist view? In the right wrist view?",
            f"The {colour} cube is at row 1 column 2.",
            f"{colour}: row 3 column 4. {colour}: not visible.",
            f"What colour is the cube at row 5 column 6? {colour}.",
            f"Which arm is nearer to the {colour} cube? The left arm. The right arm.",
            f"Is the {colour} cube in the gripper? Yes. No. The gripper is open. The gripper is closed.",
            f"How many cubes are on the table? Where are the cubes? The {colour} cube is on the table.",
            f"x 7 y 8 z 9 {colour} 0",
        ]
    text += ["system\nYou are a helpful assistant.", "user\n", "assistant\n", "State: 0 1 2 3 4 5 6 7 8 9."]
    return text


def train_tokenizer(
    views: Sequence[str],
    extra_text: Sequence[str] = (),
    vocabulary: int = 768,
    robots: Sequence[str] = (),
) -> PreTrainedTokenizerBase:
    """Trains the tiny tokenizer.

    Args:
        views: view names; each gets its two boundary tokens.
        extra_text: more sentences, e.g. the grounding questions of a training script.
        vocabulary: upper bound of the size, special tokens included.
        robots: tags of those that the prompts will name.

    Returns:
        A ``Qwen2Tokenizer`` with ChatML as chat template.
    """
    corpus = [*project_corpus(robots), *extra_text]
    core = Tokenizer(models.BPE())
    core.normalizer = normalizers.NFC()
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    reserved = len(SPECIAL_TOKENS) + len(PHRASES) + 2 * len(views)
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary - reserved,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    core.train_from_iterator(corpus, trainer)
    model = json.loads(core.to_str())["model"]
    tokenizer = Qwen2Tokenizer(
        vocab=model["vocab"], merges=[tuple(pair) for pair in model["merges"]], eos_token="<|im_end|>"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": list(SPECIAL_TOKENS)})
    tokenizer.add_tokens([AddedToken(phrase, normalized=False) for phrase in PHRASES])
    tokenizer.chat_template = CHAT_TEMPLATE
    add_view_tokens(tokenizer, views)
    return tokenizer


def view_tokens(view: str) -> tuple[str, str]:
    """The boundary tokens of a view [P]."""
    return f"<|{view}_start|>", f"<|{view}_end|>"


def add_view_tokens(tokenizer: PreTrainedTokenizerBase, views: Sequence[str]) -> int:
    """Adds the boundary tokens of ``views`` as special tokens; returns how many were new."""
    known = tokenizer.get_vocab()
    wanted = [token for view in views for token in view_tokens(view) if token not in known]
    return tokenizer.add_tokens(wanted, special_tokens=True) if wanted else 0
