"""Curvature followed during training, without touching it.

Reading order: moment, measures, track, tracker.
"""

from hessian_tools.tracking.measures import MEASURES, TrackedMeasure
from hessian_tools.tracking.moment import Moment
from hessian_tools.tracking.track import Track
from hessian_tools.tracking.tracker import Tracker

__all__ = ["MEASURES", "Moment", "Track", "TrackedMeasure", "Tracker"]
