"""Write a split's questions as a task that lmms-eval runs from local files, offline.

::

    DIR/NAME.yaml        the task, found with --include_path DIR
    DIR/utils.py         its functions; they need nothing of this package
    DIR/NAME.jsonl       one question a line
    DIR/images/ID.png    the images
    DIR/train.json       the training split in LLaVA's format, with its images in train/ (where asked for)
"""

from __future__ import annotations

import hashlib
import inspect
import io
import json
from collections.abc import Callable
from pathlib import Path

from rice_eval.datasets.base import Dataset
from rice_eval.datasets.scenes_vqa import POST_PROMPT
from rice_eval.mllm.judge import MAX_NEW_TOKENS
from rice_eval.mllm.score import normalise
from rice_eval.mllm.vqa import asked, llava_entries
from rice_eval.results.store import write_atomic, writing

__all__ = ["TASK_VERSION", "write_task"]

TASK_VERSION = 1
"""Raised with every change of a prompt or of the scoring."""

_YAML = """# {title}
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: generate_until
doc_to_visual: !function utils.doc_to_visual
doc_to_text: !function utils.doc_to_text
doc_to_target: answer
process_results: !function utils.process_results
generation_kwargs:
  max_new_tokens: {most}
  temperature: 0
  do_sample: false
  until: []
lmms_eval_specific_kwargs:
  default:
    pre_prompt: ""
    post_prompt: {post}
metric_list:
{metrics}metadata:
  version: {version}
  sha256: {sha}
"""

_UTILS = '''"""Functions of the task {name}: images beside this file, exact match of short answers."""

from pathlib import Path

from PIL import Image

HERE = Path(__file__).parent
KINDS = {kinds}


def doc_to_visual(doc):
    return [Image.open(HERE / doc["image"]).convert("RGB")]


def doc_to_text(doc, lmms_eval_specific_kwargs=None):
    words = lmms_eval_specific_kwargs or {{}}
    return words.get("pre_prompt", "") + doc["question"] + words.get("post_prompt", "")


{normalise}

def process_results(doc, results):
    right = float(normalise(results[0]) == normalise(doc["answer"]))
    kind = doc["kind"]
    scores = {{"accuracy": right}}
    scores.update({{f"accuracy_{{k}}": right if k == kind else None for k in KINDS}})
    return scores


def mean(scores):
    kept = [s for s in scores if s is not None]
    return sum(kept) / len(kept) if kept else 0.0
'''


def write_task(
    dataset: Dataset,
    out: Path,
    name: str = "scenes_vqa",
    train: Dataset | None = None,
    advance: Callable[[int], None] = lambda n: None,
) -> Path:
    """Write the task.

    Args:
        dataset: the split whose questions are asked.
        out: the folder; files of the same names are replaced.
        name: of the task.
        train: a training split, written in LLaVA's format beside it.
        advance: called with the number of images written.

    Returns:
        ``out``, for ``--include_path``.

    Raises:
        RecordError: the folder can't be written.
    """
    from PIL import Image as Pil

    out = out.absolute()
    questions = asked(dataset)
    kinds = list(dict.fromkeys(q.kind for q in questions))
    rows = [
        json.dumps(
            {
                "id": q.id,
                "image": f"images/{q.image_id}.png",
                "image_id": q.image_id,
                "kind": q.kind,
                "question": q.question,
                "answer": q.answer,
            },
            ensure_ascii=False,
        )
        for q in questions
    ]
    utils = _UTILS.format(name=name, kinds=kinds, normalise=inspect.getsource(normalise))
    digest = hashlib.sha256(f"{dataset.fingerprint}\0{POST_PROMPT}\0{utils}\0".encode())
    digest.update("\n".join(rows).encode())
    metrics = "".join(
        f"  - metric: {m}\n    aggregation: !function utils.mean\n    higher_is_better: true\n"
        for m in ("accuracy", *(f"accuracy_{k}" for k in kinds))
    )
    task = _YAML.format(
        title=f"{dataset.name}, {dataset.split}: {len(questions)} questions about {len(dataset)} images",
        name=name,
        data=json.dumps(str(out / f"{name}.jsonl")),
        most=MAX_NEW_TOKENS,
        post=json.dumps(POST_PROMPT),
        metrics=metrics,
        version=TASK_VERSION,
        sha=digest.hexdigest()[:16],
    )
    with writing(out):
        for folder, split in (("images", dataset), ("train", train)):
            if split is None:
                continue
            (out / folder).mkdir(parents=True, exist_ok=True)
            for index in range(len(split)):
                file = io.BytesIO()
                Pil.fromarray(split.image(index)).save(file, "PNG")
                (out / folder / f"{split.image_id(index)}.png").write_bytes(file.getvalue())
                advance(1)
        if train is not None:
            entries = [{**e, "image": str(e["image"]).replace("images/", "train/")} for e in llava_entries(train)]
            write_atomic(out / "train.json", (json.dumps(entries, ensure_ascii=False, indent=1) + "\n").encode())
        write_atomic(out / f"{name}.jsonl", ("\n".join(rows) + "\n").encode())
        write_atomic(out / "utils.py", utils.encode())
        write_atomic(out / f"{name}.yaml", task.encode())
    return out
