"""Short answers to questions about pictures: VQAv2, and with text in the picture TextVQA, DocVQA and InfographicVQA.

Layouts, told apart by their keys:
- VQAv2 (visualqa.org; annotations CC BY 4.0, COCO pictures): ``…_questions.json`` with ``questions`` and
  ``data_subtype``; beside it ``…_annotations.json``. Pictures ``<subtype>/COCO_<subtype>_<12 digits>.jpg``.
- TextVQA 0.5.1 (textvqa.org; CC BY 4.0, OpenImages pictures): ``data`` of ``image_id``, ten ``answers``.
- DocVQA and InfographicVQA (docvqa.org, RRC portal: registration, research use): ``data`` of ``image`` or
  ``image_local_name``, ``answers``.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qwen_vla_core.data.json_source import Document, load
from qwen_vla_core.data.llava_writer import Draft, Picture, write_dataset
from qwen_vla_core.data.vl_options import add_arguments as add_shared
from qwen_vla_core.data.vl_options import option, picture_folder
from qwen_vla_core.errors import UserError

# LLaVA's wording: it tells short answers from conversation [X].
SHORT = "Answer the question using a single word or phrase."
# TextVQA's own words for questions that are none about text in the picture.
_NO_ANSWER = ("unanswerable", "answering does not require reading text in the image")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """SRC is the questions file."""
    add_shared(parser)
    parser.add_argument("--annotations", type=Path, help="VQAv2's answers (default: the file of that name beside SRC)")


def convert(src: Path, out: Path, options: Any, workers: int | None = None, progress: bool = True) -> dict[str, Any]:
    """One conversation per question, for VQAv2 per picture; see ``write_dataset`` for result and errors."""
    src = Path(src)
    document, root = load(src), picture_folder(options, src)
    files = [src]
    if isinstance(document.value, dict) and "questions" in document.value:
        answers = option(options, "annotations") or _annotations(src)
        files.append(answers)
        drafts, layout = _vqav2(document, load(answers), root), "VQAv2"
    else:
        drafts, layout = _reading(document, root), "TextVQA / DocVQA"
    source = {"name": "vqa", "annotations": src.name, "layout": layout, "licence": "see the corpus"}
    return write_dataset(
        Path(out), drafts, family="general_vl", source=source, files=files, options=options, workers=workers,
        progress=progress,
    )  # fmt: skip


def _annotations(src: Path) -> Path:
    name = src.name.replace("OpenEnded_", "").replace("MultipleChoice_", "").replace("_questions", "_annotations")
    if name == src.name or not src.with_name(name).is_file():
        raise UserError(f"{src}: its answers are not beside it; name them with --annotations")
    return src.with_name(name)


def _vqav2(questions: Document, answers: Document, root: Path) -> list[Draft]:
    subtype = str(questions.value.get("data_subtype", ""))
    given: dict[Any, tuple[str, str]] = {}
    for number, entry in enumerate(answers.array("annotations")):
        at = ("annotations", number)
        key = answers.get(entry, (int, str), "question_id", *at)
        given[key] = answers.get(entry, str, "multiple_choice_answer", *at), str(entry.get("answer_type", ""))
    by_picture: dict[Any, list[tuple[str, str, str]]] = {}
    drafts: list[Draft] = []
    first: dict[Any, str] = {}
    for number, entry in enumerate(questions.array("questions")):
        at = ("questions", number)
        key = questions.get(entry, (int, str), "question_id", *at)
        image = questions.get(entry, (int, str), "image_id", *at)
        text = questions.get(entry, str, "question", *at)
        if key not in given:
            drafts.append(Draft(f"vqa-{key}", (), (), questions.where(*at), problem="has no answer (a test split?)"))
            continue
        first.setdefault(image, questions.where(*at))
        by_picture.setdefault(image, []).append((text, *given[key]))
    for image, turns in by_picture.items():
        name = f"COCO_{subtype}_{image:012d}.jpg" if isinstance(image, int) else f"{image}.jpg"
        path = root / subtype / name if (root / subtype).is_dir() else root / name
        kinds = {kind for _, _, kind in turns}
        drafts.append(
            Draft(
                id=f"vqa-image-{image}",
                pictures=(Picture(str(path), f"{subtype}/{name}" if subtype else name),),
                turns=tuple((f"{q}\n{SHORT}" if not n else q, a) for n, (q, a, _) in enumerate(turns)),
                where=first[image],
                task=f"vqa {kinds.pop()}" if len(kinds) == 1 else "vqa",
            )
        )
    return drafts


def _reading(document: Document, root: Path) -> list[Draft]:
    drafts = []
    for number, entry in enumerate(document.array("data")):
        at = ("data", number)
        question = document.get(entry, str, "question", *at)
        key = entry.get("questionId", entry.get("question_id", number))
        if isinstance(entry.get("image_id"), str) and "image" not in entry:
            name, task = f"{entry['image_id']}.jpg", "ocr scene"
            folder = root / "train_images" if (root / "train_images").is_dir() else root
        else:
            field = "image_local_name" if "image_local_name" in entry else "image"
            name, task, folder = document.get(entry, str, field, *at), "ocr document", root
        answers = entry.get("answers") or []
        if not isinstance(answers, list) or not all(isinstance(answer, str) for answer in answers):
            document.fail("expected a list of texts", *at, "answers")
        answer, problem = most_given(answers), ""
        if not answer:
            problem = "has no answer (a test split?)" if not answers else "its answer is empty"
        elif answer in _NO_ANSWER:
            problem = f"most annotators say: {answer}"
        drafts.append(
            Draft(
                id=f"ocr-{key}",
                pictures=(Picture(str(folder / name), name),),
                turns=((f"{question.strip()}\n{SHORT}", answer),),
                where=document.where(*at),
                task=task,
                problem=problem,
            )
        )
    return drafts


def most_given(answers: Sequence[str]) -> str:
    """What most annotators said, ignoring case; of equals the one said first, in its own spelling."""
    counts = Counter(answer.strip().lower() for answer in answers)
    if not counts:
        return ""
    most = max(counts.values())
    return next(answer.strip() for answer in answers if counts[answer.strip().lower()] == most)
