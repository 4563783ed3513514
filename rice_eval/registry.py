"""One lazy, typed registry for adapters, datasets and protocols.

A name maps to an object or to a ``"module:attribute"`` path that is imported on first use, so that listing names costs
nothing. Third parties add names through entry points (groups ``rice_eval.adapters``, ``rice_eval.datasets``,
``rice_eval.protocols``) or by decorating an object in a folder given with ``--include``.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.metadata
from collections.abc import Callable, Iterable
from typing import Generic, TypeVar, cast

from rice_eval.errors import MissingExtraError, NotFoundError, RiceEvalError, UsageError

__all__ = ["Registry", "adapters", "datasets", "did_you_mean", "protocols"]

T = TypeVar("T")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A hint for a name that is not known: close names if there are any, else some of the known ones."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    if close:
        return "did you mean " + " or ".join(repr(c) for c in close) + "?"
    return "known: " + (", ".join(names[:8]) + (", …" if len(names) > 8 else "") if names else "none")


class Registry(Generic[T]):
    """Names to objects of type ``T``, imported on first use."""

    def __init__(self, kind: str, group: str, builtin: dict[str, str]) -> None:
        self.kind = kind
        self._group = group
        self._items: dict[str, str | T] = dict(builtin)
        self._origins: dict[str, str] = dict.fromkeys(builtin, "rice_eval")
        self._scanned = False

    def _scan(self) -> None:
        if self._scanned:
            return
        self._scanned = True
        for entry in importlib.metadata.entry_points(group=self._group):
            self._put(entry.name, entry.value, origin=entry.dist.name if entry.dist else entry.value)

    def _put(self, name: str, item: str | T, origin: str) -> None:
        if name in self._items and self._origins[name] != origin:
            raise UsageError(
                f"{self.kind} '{name}' is registered by both {self._origins[name]} and {origin}", "rename one of them"
            )
        self._items[name] = item
        self._origins[name] = origin

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator that adds an object under ``name``."""

        def add(item: T) -> T:
            self._put(name, item, origin=str(getattr(item, "__module__", "?")))
            return item

        return add

    def names(self) -> list[str]:
        """All names, sorted."""
        self._scan()
        return sorted(self._items)

    def origin(self, name: str) -> str:
        """The package that registered ``name``."""
        self._scan()
        return self._origins[name]

    def __contains__(self, name: object) -> bool:
        self._scan()
        return name in self._items

    def get(self, name: str) -> T:
        """The object under ``name``.

        Raises:
            NotFoundError: no such name; the message proposes close ones.
            MissingExtraError: the module behind the name needs a package that is not installed.
        """
        self._scan()
        if name not in self._items:
            raise NotFoundError(f"no {self.kind} is named '{name}'", did_you_mean(name, self._items))
        item = self._items[name]
        if isinstance(item, str):
            module, _, attribute = item.partition(":")
            try:
                item = cast(T, getattr(importlib.import_module(module), attribute))
            except RiceEvalError:
                raise
            except ImportError as error:
                raise MissingExtraError(
                    f"{self.kind} '{name}' can't be imported: {error}", "install the extra that brings the package"
                ) from error
            self._items[name] = item
        return item


# The values are factories or classes; their exact types are documented where they are called:
# adapters -> rice_eval.adapters.base.Adapter, datasets -> rice_eval.datasets.base.DatasetFactory,
# protocols -> type[rice_eval.protocols.base.Protocol].
adapters: Registry[object] = Registry(
    "adapter",
    "rice_eval.adapters",
    {
        "floors": "rice_eval.adapters.floors:adapter",
        "packaged": "rice_eval.adapters.packaged:adapter",
        "timm": "rice_eval.adapters.timm:adapter",
        "rice": "rice_eval.adapters.rice:adapter",
        "clip": "rice_eval.adapters.clip:adapter",
        "siglip": "rice_eval.adapters.siglip:adapter",
        "cloc": "rice_eval.adapters.cloc:adapter",
        "open_clip": "rice_eval.adapters.open_clip:adapter",
        "hf": "rice_eval.adapters.hf:adapter",
        "onnx": "rice_eval.adapters.onnx:adapter",
        "file": "rice_eval.adapters.file:adapter",
    },
)
datasets: Registry[object] = Registry(
    "dataset",
    "rice_eval.datasets",
    {
        "scenes": "rice_eval.datasets.scenes:factory",
        "scenes-text": "rice_eval.datasets.scenes_text_set:factory",
        "scenes-vqa": "rice_eval.datasets.scenes_vqa:factory",
        "lmms-eval": "rice_eval.datasets.lmms_eval:factory",
        "coco-panoptic": "rice_eval.datasets.coco_panoptic:factory",
        "ade20k": "rice_eval.datasets.segmentation:ade20k",
        "cityscapes": "rice_eval.datasets.segmentation:cityscapes",
        "coco-stuff": "rice_eval.datasets.segmentation:coco_stuff",
        "voc2012": "rice_eval.datasets.voc:voc2012",
        "pascal-context": "rice_eval.datasets.voc:pascal_context",
        "folder": "rice_eval.datasets.folder:factory",
        "coco": "rice_eval.datasets.detection:coco",
        "coco-format": "rice_eval.datasets.detection:coco_format",
        "lvis": "rice_eval.datasets.detection:lvis",
        "voc-detection": "rice_eval.datasets.voc:voc_detection",
        "roboflow100": "rice_eval.datasets.roboflow:factory",
        "refcoco": "rice_eval.datasets.regions:refcoco",
        "grit": "rice_eval.datasets.regions:grit",
        "visual-genome": "rice_eval.datasets.regions:visual_genome",
        "flickr30k-entities": "rice_eval.datasets.regions:flickr30k",
        "sroie": "rice_eval.datasets.text:sroie",
        "icdar2015": "rice_eval.datasets.text:icdar2015",
        "totaltext": "rice_eval.datasets.text:totaltext",
        "funsd": "rice_eval.datasets.text:funsd",
        "coco-text": "rice_eval.datasets.text_json:coco_text",
        "textocr": "rice_eval.datasets.text_json:textocr",
        "lmdb": "rice_eval.datasets.recognition:lmdb_crops",
        "union14m": "rice_eval.datasets.union14m:union14m",
        "label-file": "rice_eval.datasets.recognition:label_file",
    },
)
protocols: Registry[object] = Registry(
    "protocol",
    "rice_eval.protocols",
    {
        "linear": "rice_eval.protocols.linear:Linear",
        "perception-probe": "rice_eval.protocols.perception:PerceptionProbe",
        "lmms-eval": "rice_eval.protocols.lmms:LmmsEval",
        "head-import": "rice_eval.protocols.heads:HeadImport",
        "zero-shot-seg": "rice_eval.protocols.zeroshot:ZeroShotSeg",
        "capi-knn": "rice_eval.protocols.knn:CapiKnn",
        "capi-logreg": "rice_eval.protocols.logreg:CapiLogreg",
        "hummingbird-knn": "rice_eval.protocols.knn:HummingbirdKnn",
        "visbench-linear": "rice_eval.protocols.linear_visbench:VisbenchLinear",
        "gram-lda": "rice_eval.protocols.gram:GramLDA",
        "gram-ridge": "rice_eval.protocols.gram:GramRidge",
        "zero-shot-boxes": "rice_eval.protocols.zeroshot_boxes:ZeroShotBoxes",
        "fcos-linear": "rice_eval.protocols.detection_fcos:FcosLinear",
        "fcos-sfp": "rice_eval.protocols.detection_fcos:FcosSfp",
        "mask-rcnn-frozen": "rice_eval.protocols.cascade:MaskRcnnFrozen",
        "cascade-mask-rcnn-frozen": "rice_eval.protocols.cascade:CascadeMaskRcnnFrozen",
        "rice-detection": "rice_eval.protocols.cascade:RiceDetection",
        "refer-boxes": "rice_eval.protocols.zeroshot_boxes:ReferBoxes",
        "region-linear": "rice_eval.protocols.regions_probe:RegionLinear",
        "region-knn": "rice_eval.protocols.regions_probe:RegionKnn",
        "cloc-region": "rice_eval.protocols.regions_text:ClocRegion",
        "region-retrieval": "rice_eval.protocols.regions_text:RegionRetrieval",
        "ctc-linear": "rice_eval.protocols.ocr:CtcLinear",
        "text-mask": "rice_eval.protocols.ocr_mask:TextMask",
        "read-page": "rice_eval.protocols.ocr_pages:ReadPage",
        "attn-probe": "rice_eval.protocols.ocr_attention:AttnProbe",
        "region-tokens": "rice_eval.protocols.ocr_regions:RegionTokens",
        "zero-shot-words": "rice_eval.protocols.ocr_regions:ZeroShotWords",
        "dinov2-linear": "rice_eval.protocols.online_recipes:Dinov2Linear",
        "dinov2-linear-ms": "rice_eval.protocols.online_recipes:Dinov2LinearMs",
        "dinov3-linear": "rice_eval.protocols.online_recipes:Dinov3Linear",
        "radio-linear": "rice_eval.protocols.online_recipes:RadioLinear",
        "vfm-ss-linear": "rice_eval.protocols.online_recipes:VfmSsLinear",
    },
)
