"""The one place that imports torchvision, and that repairs it beside a CPU-only torch.

torchvision from the package registry is built for the CUDA build of torch. Beside a CPU-only torch
its compiled extension does not load, the operators that it would have declared are missing, and
importing it fails with "operator torchvision::nms does not exist"; so does every transformers
model, because transformers looks for torchvision. Nothing here calls those operators (they serve
detection); they are declared, and only after a plain import has failed in this way.
"""

import importlib
import sys
from types import ModuleType

import torch

_SCHEMA = "{}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
# kept, as a Library takes its declarations with it when it is collected
_declared: list[torch.library.Library] = []


def torchvision() -> ModuleType:
    """Import torchvision, repaired if need be. Raises ImportError when it is not installed."""
    repair()
    return importlib.import_module("torchvision")


def repair() -> bool:
    """Make ``import torchvision`` and transformers' models work where operators are missing.

    Returns whether the operators had to be declared now. When code of your own fails to import for
    this reason, call it and, if it returns True, import again. It does nothing when torchvision is
    not installed, works already or fails otherwise: that error is left to whoever imports it.
    """
    if _declared or not _operators_are_missing():
        return False
    library = torch.library.Library("torchvision", "DEF")
    for operator in ("nms", "qnms"):
        library.define(_SCHEMA.format(operator))
    _declared.append(library)
    # The failed import has removed torchvision from sys.modules but left its submodules there;
    # a failed import of transformers leaves nothing.
    for name in [name for name in sys.modules if name.startswith("torchvision.")]:
        del sys.modules[name]
    importlib.import_module("torchvision")
    return True


def _operators_are_missing() -> bool:
    try:
        importlib.import_module("torchvision")
    except ImportError:
        return False
    except RuntimeError as error:
        return "operator torchvision::" in str(error)
    return False
