"""Curvature followed during training, without touching it.

Reading order: moment, measures, track, tracker; trainers: the same inside transformers' Trainer and
Lightning.
"""

from hessian_tools.tracking.measures import MEASURES, TrackedMeasure
from hessian_tools.tracking.moment import Moment
from hessian_tools.tracking.track import Track
from hessian_tools.tracking.tracker import Tracker
from hessian_tools.tracking.trainers import follow_trainer, lightning_callback

__all__ = [
    "MEASURES",
    "Moment",
    "Track",
    "TrackedMeasure",
    "Tracker",
    "follow_trainer",
    "lightning_callback",
]
