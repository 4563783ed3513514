"""Pictures of a result: panels for the report and predictions for other tools."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from rice_eval.bank.source import TokenReader
from rice_eval.datasets.base import Dataset
from rice_eval.datasets.detection import CocoDetection
from rice_eval.datasets.subset import Subset
from rice_eval.errors import UsageError
from rice_eval.metrics.coco import Found, Truth
from rice_eval.metrics.tide import breakdown, recall_by_crowding
from rice_eval.protocols.base import Panel
from rice_eval.protocols.detection import image_truth
from rice_eval.report.panel_files import panels_folder, save_panels
from rice_eval.report.panels import (
    Boxes,
    PanelPicture,
    Polygons,
    detection_panel,
    pca_maps,
    segmentation_panel,
    text_panel,
)

__all__ = ["coco_results", "errors_of", "save_pictures", "save_predictions", "text_results", "token_maps"]


def token_maps(reader: TokenReader, layer: int, indices: Sequence[int]) -> dict[int, NDArray[np.uint8]]:
    """index -> ``(h, w, 3)`` uint8: the first three principal components of the tokens of the view's first frame."""
    tokens, grids = [], []
    for index in indices:
        image = reader[index]
        tokens.append(image.patches[layer][0].float().numpy())
        grids.append(image.grids[layer][0])
    return dict(zip(indices, pca_maps(tokens, grids)))


def save_pictures(
    record: Path, panels: Sequence[Panel], dataset: Dataset, maps: Mapping[int, NDArray[np.uint8]], kind: str
) -> None:
    """Write the panels of a record beside it.

    Args:
        record: the record's file.
        panels: test images with truth and prediction.
        dataset: the test split.
        maps: from ``token_maps``; empty where tokens were not kept.
        kind: kind of the task.
    """
    painters = {"segmentation": _segmented, "detection": _detected, "ocr": _read}
    if not panels or kind not in painters:
        return
    pictures = [painters[kind](panel, dataset, maps.get(panel.index)) for panel in panels]
    save_panels(panels_folder(record), pictures)


def _segmented(panel: Panel, dataset: Dataset, tokens: NDArray[np.uint8] | None) -> PanelPicture:
    return segmentation_panel(
        panel.image_id,
        panel.index,
        dataset.image(panel.index),
        panel.truth,
        panel.prediction,
        dataset.classes,
        palette=dataset.palette,
        tokens=tokens,
    )


def _detected(panel: Panel, dataset: Dataset, tokens: NDArray[np.uint8] | None) -> PanelPicture:
    truth, found = panel.truth, panel.prediction
    assert isinstance(truth, Truth)
    assert isinstance(found, Found)
    # As many boxes as there are objects, the surest ones: scores of different heads are not on one scale.
    wanted = max(1, int((~truth.crowd).sum()))
    least = np.sort(found.scores)[-wanted] if len(found.scores) > wanted else 0.0
    return detection_panel(
        panel.image_id,
        panel.index,
        dataset.image(panel.index),
        Boxes(truth.boxes, truth.labels),
        Boxes(found.boxes, found.labels, found.scores),
        dataset.things,
        score=float(least),
        tokens=tokens,
    )


def _read(panel: Panel, dataset: Dataset, tokens: NDArray[np.uint8] | None) -> PanelPicture:
    truth, found = panel.truth, panel.prediction
    assert isinstance(truth, Polygons)
    assert isinstance(found, Polygons)
    picture = text_panel(panel.image_id, panel.index, dataset.image(panel.index), truth, found, tokens=tokens)
    if any(found.texts) or not truth.texts:
        return picture
    return replace(picture, note=f"{len(truth.texts)} true regions, {len(found.texts)} found")


def save_predictions(folder: Path, predictions: Mapping[str, Any], dataset: Dataset) -> None:
    """Write every test image's prediction.

    Label maps become one PNG an image, a class index a pixel (8 bits where the indices fit, else 16); detections one
    ``detections.json`` in COCO's results format, with the file's own image and category ids where the dataset has them, and
    ``errors.json``: where AP50 is lost.

    Raises:
        UsageError: the folder can't be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if predictions and all(isinstance(p, Found) for p in predictions.values()):
            _write_json(folder / "detections.json", coco_results(predictions, dataset))
            _write_json(folder / "errors.json", errors_of(predictions, dataset))
            return
        if predictions and all(isinstance(p, Polygons) for p in predictions.values()):
            _write_json(folder / "text.json", text_results(predictions))
            return
        for image_id, labels in predictions.items():
            array = np.asarray(labels)
            wide = bool(array.size) and int(array.max()) > 255
            target = folder / f"{image_id.replace('/', '__')}.png"
            partial = target.with_suffix(".part")
            Image.fromarray(array.astype(np.uint16 if wide else np.uint8)).save(partial, format="PNG")
            partial.replace(target)
    except OSError as error:
        raise UsageError(
            f"--save-predictions {folder}: {error.strerror}", "choose another folder or free some space"
        ) from error


def _write_json(target: Path, content: Any) -> None:
    partial = target.with_suffix(".part")
    partial.write_text(json.dumps(content, ensure_ascii=False) + "\n", encoding="utf-8")
    partial.replace(target)


def text_results(predictions: Mapping[str, Polygons]) -> dict[str, list[dict[str, Any]]]:
    """Image name -> its regions: ``polygon`` as ``[[x, y], …]`` in pixels, and ``text`` (empty where none was read)."""
    return {
        name: [{"polygon": p.round(2).tolist(), "text": t} for p, t in zip(found.polygons, found.texts)]
        for name, found in predictions.items()
    }


def errors_of(predictions: Mapping[str, Found], dataset: Dataset) -> dict[str, Any]:
    """The error breakdown of detections, and recall by the number of objects in an image; see ``rice_eval.metrics.tide``."""
    index_of = {dataset.image_id(i): i for i in range(len(dataset))}
    truth = [image_truth(dataset, index_of[name]) for name in predictions]
    found = list(predictions.values())
    lost = breakdown(truth, found, len(dataset.things))
    crowding = {
        bucket: {"recall50": None if recall != recall else recall, "targets": targets}
        for bucket, (recall, targets) in recall_by_crowding(truth, found).items()
    }
    return {"ap50": lost.ap50, "counts": lost.counts, "costs": lost.costs, "crowding": crowding}


def coco_results(predictions: Mapping[str, Found], dataset: Dataset) -> list[dict[str, Any]]:
    """Detections in COCO's results format: ``image_id``, ``category_id``, ``bbox`` xywh, ``score``, masks where there are any.

    Args:
        predictions: image name -> its detections.
        dataset: the test split; without ids of its own, images keep their names and categories count from 1.
    """
    while isinstance(dataset, Subset):
        dataset = dataset.base
    keys: dict[str, Any] = {}
    categories: Sequence[int] = range(1, len(dataset.things) + 1)
    if isinstance(dataset, CocoDetection):
        categories = dataset.category_ids
        keys = {dataset.image_id(i): key for i, key in enumerate(dataset.image_keys)}
    out = []
    for name, found in predictions.items():
        for k, (box, score, label) in enumerate(
            zip(found.boxes.tolist(), found.scores.tolist(), found.labels.tolist())
        ):
            x1, y1, x2, y2 = box
            entry = {"image_id": keys.get(name, name), "category_id": int(categories[label])}
            entry |= {"bbox": [x1, y1, x2 - x1, y2 - y1], "score": score}
            if found.masks is not None:
                counts = found.masks[k]["counts"]
                text = counts.decode() if isinstance(counts, bytes) else counts
                entry["segmentation"] = {"size": list(found.masks[k]["size"]), "counts": text}
            out.append(entry)
    return out
