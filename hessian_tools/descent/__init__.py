"""What methods of descent can gain on the local quadratic.

Reading order: reduced, trajectories, batch_errors, methods, predicted_result, predicted.
"""

from hessian_tools.descent.predicted import predicted_progress
from hessian_tools.descent.predicted_result import Decrease, PredictedProgress

__all__ = ["Decrease", "PredictedProgress", "predicted_progress"]
