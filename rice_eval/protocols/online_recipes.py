"""The published recipes as named protocols: every number of them is a field.

Sources: the recipes' released code where there is any (named at each), read point by point; where a copy of a config differs from
another, the docstring says so. docs/protocols.md has the table.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from rice_eval.protocols.augment import AugmentName
from rice_eval.protocols.online import OnlineLinear
from rice_eval.protocols.online_head import Precision
from rice_eval.protocols.schedules import ScheduleName
from rice_eval.protocols.segmentation import LayerSet

__all__ = ["Dinov2Linear", "Dinov2LinearMs", "Dinov3Linear", "RadioLinear", "VfmSsLinear"]


@dataclass(frozen=True)
class Dinov2Linear(OnlineLinear):
    """DINOv2's linear segmentation (arXiv 2304.07193, section 7.4): batch norm and 1x1 convolution on the last block.

    The training config is known from copies of it in later work; they differ in ``img_scale`` ((2048, 512) or (99999999, 518))
    and in the crop (512 or 518). This is the 512 form; images longer than four times their height are not capped at 2048.
    """

    id: ClassVar[str] = "dinov2-linear"


@dataclass(frozen=True)
class Dinov2LinearMs(OnlineLinear):
    """DINOv2's ``+ms``: the last four blocks concatenated, 640 px, scales and mirror images averaged at test.

    Scale range 1 to 3 and the five test scales are those of the copies of its multi-scale config; the stride of the test windows
    is not printed in any of them: two thirds of the crop, as in the single-scale form.
    """

    id: ClassVar[str] = "dinov2-linear-ms"

    view: str = "short=640,slide=426,crop=640,pad=patch,interp=plain"
    layer_set: LayerSet = "last4"
    side: str = "640"
    ratios: tuple[float, ...] = (1.0, 3.0)
    crop: str = "640"
    scales: tuple[float, ...] = (1.0, 1.32, 1.73, 2.28, 3.0)
    mirror: bool = True


@dataclass(frozen=True)
class Dinov3Linear(OnlineLinear):
    """DINOv3's linear segmentation (``dinov3/eval/segmentation``, config-ade20k-linear-training.yaml).

    1,024 tokens an image: sides are 32 patches, 512 px for a patch of 16 and 448 px for one of 14. The released loop validates
    eight times and reports the best; here the head after the last step is tested once. Hue turns by up to half the wheel either
    way, as in its code.
    """

    id: ClassVar[str] = "dinov3-linear"

    view: str = "short=32p,slide=341,interp=bilinear,pad=patch"
    dropout: float = 0.1
    wd: float = 1e-3
    schedule: ScheduleName = "one-cycle"
    augment: AugmentName = "dinov3"
    side: str = "32p"
    crop: str = "32p"
    hue: float = 0.5
    squeeze: bool = False


@dataclass(frozen=True)
class RadioLinear(OnlineLinear):
    """RADIO's ADE20K linear probe (NVlabs/RADIO, ``mmseg``): whole images at test, 80,000 steps, no weight decay.

    Its released config pads crops of 512 px to 518 in the preprocessor (its issue 73): six rows and columns of ignored pixels, which
    the mean of the loss counts. Here crops stay 512 px and are padded for the encoder alone.
    """

    id: ClassVar[str] = "radio-linear"

    view: str = "short=512,pad=patch,interp=plain"
    wd: float = 0.0
    steps: int = 80_000
    schedule: ScheduleName = "poly-after-warmup"


@dataclass(frozen=True)
class VfmSsLinear(OnlineLinear):
    """Linear probe of benchmark-vfm-ss (tue-mps; arXiv 2405.18021) with the encoder frozen: a linear map without norm.

    Its code resamples every encoder to patches of 16; here the encoder keeps its patch and crops are padded to a multiple of it.
    """

    id: ClassVar[str] = "vfm-ss-linear"

    view: str = "short=512,slide=even,pad=patch,interp=bilinear"
    head_norm: bool = False
    init: Literal["normal", "uniform"] = "uniform"
    lr: float = 1e-4
    wd: float = 0.05
    warmup: int = 0
    power: float = 0.9
    augment: AugmentName = "vfm"
    hue: float = 0.05
    average_ignored: bool = False
    precision: Precision = "fp16"
    squeeze: bool = False
