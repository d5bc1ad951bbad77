"""AnyUp with hook points. Read `core/anyup.py` first; to add an idea, read `core/hooks.py`."""

from core import training  # noqa: F401  registers the baseline objective and learner
from core.adaptation import adapt
from core.anyup import AnyUp
from core.backbones import imagenet_normalize, load_backbone
from core.batch import Batch, Clip, Context
from core.checkpoint import save, warm_start
from core.compose import available, build_filler, compose
from core.hooks import Attention, Decoder, Learner, Objective, Refiner, Temporal, Unifier
from core.models import build, from_config, from_published, load, load_learner, save_delta
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
    "adapt",
    "available",
    "build",
    "build_filler",
    "compose",
    "from_config",
    "from_published",
    "imagenet_normalize",
    "load",
    "load_backbone",
    "load_learner",
    "register",
    "save",
    "save_delta",
    "warm_start",
]
