"""AnyUp with hook points. Read `core/anyup.py` first; to add an idea, read `core/hooks.py`."""

from core import training  # noqa: F401  registers the baseline objective and learner
from core.anyup import AnyUp
from core.backbones import imagenet_normalize, load_backbone
from core.batch import Batch, Clip, Context
from core.checkpoint import save, warm_start
from core.compose import available, build_filler, compose
from core.hooks import Attention, Decoder, Learner, Objective, Refiner, Temporal, Unifier
from core.models import build, from_config, from_published, load
from core.registry import register
from core.uncertainty import Uncertainty
from core.weight_files import WeightsError

__all__ = [
    "AnyUp",
    "Attention",
    "Batch",
    "Clip",
    "Context",
    "Decoder",
    "Learner",
    "Objective",
    "Refiner",
    "Temporal",
    "Uncertainty",
    "Unifier",
    "WeightsError",
    "available",
    "build",
    "build_filler",
    "compose",
    "from_config",
    "from_published",
    "imagenet_normalize",
    "load",
    "load_backbone",
    "register",
    "save",
    "warm_start",
]
