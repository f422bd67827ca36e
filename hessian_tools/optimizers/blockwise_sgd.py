"""SGD with a rate for each block, from the block's own measured spectrum.

    m <- b m + (1 - b) g
    p_b <- p_b (1 - rate_b wd) - rate_b m_b / (1 - b^t),    rate_b = lr / largest |Ritz value| of b

On a quadratic of blocks, c / lambda_max for each block is what makes gradient descent with a rate a
block beat Adam (Zhang et al., arXiv 2406.16793, section 2); ``lr`` is the one c that is swept. The
Ritz values are those of a few Lanczos steps on every diagonal block of the Hessian or another
matrix (:func:`hessian_tools.structure.conditioning.block_extremes`), measured before the first step
and again every ``refresh`` steps, at the weights of that time.

A block whose curvature vanishes, or is rounding beside the largest, has no rate of its own: it gets
the largest that another block of the model has, and counts in ``unmeasured``.

Letters: B blocks, t steps.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from hessian_tools.blocks.param_groups import ParamGroup, param_groups
from hessian_tools.blocks.partition import Partition
from hessian_tools.curvature.hessian import as_operator
from hessian_tools.curvature.operators import CurvatureOperator
from hessian_tools.optimizers.blockwise_adam import by_blocks
from hessian_tools.optimizers.checks import check_gradient, check_settings
from hessian_tools.problem.problem import Problem
from hessian_tools.structure.conditioning import block_extremes

Closure = Callable[[], Tensor | float]
_ROUNDINGS = 100.0  # of a block's scale below which curvature is taken for zero


class BlockwiseSGD(torch.optim.Optimizer):
    """SGD with a rate a block. State: ``exp_avg``, and ``curvature``, (B,), by the group's cuts.

    Args:
        curvature: a Problem (its Hessian) or an operator, such as an
            :class:`hessian_tools.GaussNewtonOperator`, of the model that is trained, on the batches
            that its curvature is measured on.
        partition: of the model; every entry in some block.
        lr: c; below 2 a quadratic of separate blocks does not diverge.
        momentum: b, of an averaged gradient.
        refresh: steps from one measurement to the next; None measures once.
        num_steps: of Lanczos, for each block.
        weight_decay: decoupled, wd.
        seed: of the probes.

    Attributes: ``measurements`` made so far; ``unmeasured`` blocks in the last.

    Raises:
        ValueError: a number out of range; a partition that leaves out entries.
    """

    def __init__(
        self,
        curvature: Problem | CurvatureOperator,
        partition: Partition,
        lr: float = 1.0,
        momentum: float = 0.9,
        *,
        refresh: int | None = None,
        num_steps: int = 12,
        weight_decay: float = 0.0,
        seed: int = 0,
    ) -> None:
        operator = as_operator(curvature)
        if refresh is not None and refresh < 1:
            raise ValueError(f"refresh is {refresh}; a number of steps from 1, or None, is needed")
        groups = param_groups(operator.problem.model, partition)
        left = [group for group in groups if group["block"] == "(no block)"]
        if left:
            names = ", ".join(left[0]["names"][:3])
            raise ValueError(
                f"partition leaves {names} in no block, which then has no rate; take one of all "
                "parameters, such as 'tensor'"
            )
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        super().__init__(groups, defaults)
        for group in self.param_groups:
            check_settings(group)
        self.operator = operator
        self.partition = partition
        self.refresh = refresh
        self.num_steps = num_steps
        self.seed = seed
        self.measurements = 0
        self.unmeasured: tuple[str, ...] = ()
        self._made = 0  # steps, those of a loaded state included

    def step(  # type: ignore[override]  # torch's own has overloads
        self,
        closure: Closure | None = None,
    ) -> Tensor | float | None:
        """One step, after a measurement where it is due; returns what ``closure`` does."""
        loss = None if closure is None else closure()
        self._made = max((int(s["step"]) for s in self.state.values() if "step" in s), default=0)
        is_first = not any("curvature" in state for state in self.state.values())
        if is_first or (self.refresh and self._made % self.refresh == 0):
            self.measure()
        with torch.no_grad():
            for group in self.param_groups:
                for p in group["params"]:
                    if p.grad is not None:
                        check_gradient(p, "BlockwiseSGD")
                        self._update(p, p.grad, group)
        return loss

    def measure(self) -> None:
        """Measures the largest |Ritz value| of every block at the present weights."""
        found = block_extremes(
            self.operator, self.partition, num_steps=self.num_steps, seed=self.seed, progress=False
        )
        self.operator.release()  # its graphs are those of weights that now change
        largest = np.maximum(np.abs(found.largest), np.abs(found.smallest))
        floor = _ROUNDINGS * torch.finfo(self.operator.dtype).eps * largest.max()
        known = largest > floor
        if not known.any():
            raise ValueError("the curvature of every block vanishes; no rate can be had from it")
        self.unmeasured = tuple(np.array(found.names)[~known].tolist())
        largest[~known] = largest[known].min()
        by_name = dict(zip(found.names, largest.tolist(), strict=True))
        for group in self.param_groups:
            values = self._of_group(group, by_name)
            for p in group["params"]:
                self.state[p]["curvature"] = p.new_tensor(values)
        self.measurements += 1

    def _of_group(self, group: ParamGroup, by_name: dict[str, float]) -> list[float]:
        if not group["cuts"]:
            return [by_name[str(group["block"])]]
        cuts = [cut for cut in self.partition.cuts if cut.parameters[0] == group["block"]]
        return [by_name[name] for cut in cuts for name in cut.names]

    def _update(self, p: Tensor, gradient: Tensor, group: ParamGroup) -> None:
        state = self.state[p]
        if "exp_avg" not in state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"] = torch.zeros_like(p)
        state["step"] += 1
        momentum = group["momentum"]
        lr = float(group["lr"])
        decay = group["weight_decay"]
        state["exp_avg"].lerp_(gradient, 1 - momentum)
        rate = lr / (1 - momentum ** int(state["step"]))
        means = by_blocks(state["exp_avg"], state["curvature"], group)
        moved = by_blocks(p, state["curvature"], group)
        for (region, values), (mean, _) in zip(moved, means, strict=True):
            if decay:
                region.mul_(1 - lr * decay / values)
            region.addcdiv_(mean, values, value=-rate)
