"""Bridge to the mm* packages (``rice-eval[openmmlab]``): never imported by the core.

Importing this package, or listing it in a config's ``custom_imports``, makes every encoder of the registry a backbone of mmengine's
``MODELS``::

    custom_imports = dict(imports=["rice_eval.openmmlab"])
    backbone = dict(type="rice_eval.Encoder", name="rice-vit-l-14-560")
"""

from __future__ import annotations

from rice_eval.errors import MissingExtraError
from rice_eval.openmmlab.ext import stand_in

stand_in()

try:
    from rice_eval.openmmlab.backbone import EncoderBackbone
except ImportError as error:
    raise MissingExtraError(
        f"the bridge to the mm* packages can't be imported: {error}", "pip install 'rice-eval[openmmlab]'"
    ) from error

__all__ = ["EncoderBackbone", "stand_in"]
