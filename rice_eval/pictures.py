"""Pictures of a result: panels for the report and predictions for other tools."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from rice_eval.bank.source import TokenReader
from rice_eval.datasets.base import Dataset
from rice_eval.errors import UsageError
from rice_eval.protocols.base import Panel
from rice_eval.report.panel_files import panels_folder, save_panels
from rice_eval.report.panels import pca_maps, segmentation_panel

__all__ = ["save_pictures", "save_predictions", "token_maps"]


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
    if not panels or kind != "segmentation":
        return
    pictures = [
        segmentation_panel(
            panel.image_id,
            panel.index,
            dataset.image(panel.index),
            panel.truth,
            panel.prediction,
            dataset.classes,
            palette=dataset.palette,
            tokens=maps.get(panel.index),
        )
        for panel in panels
    ]
    save_panels(panels_folder(record), pictures)


def save_predictions(folder: Path, predictions: Mapping[str, Any]) -> None:
    """Write one PNG a test image, a class index a pixel: 8 bits where the indices fit, else 16.

    Raises:
        UsageError: the folder can't be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
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
