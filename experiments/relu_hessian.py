"""The Hessian of f(x) = V relu(W x), block by block, in closed form: squared Frobenius norms for any number of inputs.

With p = softmax(f), r = p - onehot(y), h = relu(W x), g = 1[W x > 0] and A = diag(p) - p p' (cross-entropy; for the
mean squared error over all N C entries A = 2 I / C), means over the N examples:

    H_{w_i w_j}   = mean of g_i g_j (V'A V)_ij x x'
    H_{v_c v_c'}  = mean of A_cc' h h'
    H_{w_i v_ck}  = mean of g_i (A V)_ci h_k x    (Gauss-Newton)  +  [i = k] mean of g_i r_c x    (residual)

relu'' is zero almost everywhere. Norms of means of x x' and x need nothing of the inputs but their products, so an
input that is repeated may be given once, scaled. Checked against ``ht.dense_block`` by the experiments that use it.

Letters: N examples, d inputs, m hidden neurons, C classes.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

import hessian_tools as ht
from hessian_tools.problem.networks import MLP

LOSSES = {"CE": ht.cross_entropy, "MSE": ht.mse}


@dataclass(frozen=True, eq=False)
class ReluHessian:
    """Masses |H_ij|_F^2 of a network's blocks: w_i, the inputs of hidden neuron i; v_c, those of output c."""

    inputs: Tensor  # (N, d) float64
    labels: Tensor  # (N,) int64
    w: Tensor  # (m, d)
    v: Tensor  # (C, m)
    loss: str  # "CE" | "MSE", of which the residual part is known for CE only

    @cached_property
    def hidden(self) -> Tensor:
        return (self.inputs @ self.w.T).relu()  # (N, m)

    @cached_property
    def gates(self) -> Tensor:
        return (self.hidden > 0).double()  # (N, m)

    @cached_property
    def probabilities(self) -> Tensor:
        return (self.hidden @ self.v.T).softmax(1)  # (N, C)

    @property
    def mean_loss(self) -> float:
        return float(nn.functional.cross_entropy(self.hidden @ self.v.T, self.labels))

    def ww(self, inputs: Tensor | None = None) -> Tensor:
        """(m, m) masses of H_{w_i w_j}; ``inputs``, some columns of all inputs: of their weights alone."""
        inputs = self.inputs if inputs is None else inputs
        count, size = len(self.inputs), len(self.w)
        if self.loss == "CE":
            p = self.probabilities
            mean = p @ self.v  # (N, m)
            pairs = (self.v[:, :, None] * self.v[:, None, :]).flatten(1)  # (C, m m)
            inner = (p @ pairs).view(count, size, size) - mean[:, :, None] * mean[:, None, :]
        else:
            inner = (2 / len(self.v) * self.v.T @ self.v).expand(count, size, size)
        factors = (inner * self.gates[:, :, None] * self.gates[:, None, :]).flatten(1)  # (N, m m)
        products = (inputs @ inputs.T).square_()  # (N, N)
        return ((products @ factors) * factors).sum(0).view(size, size) / count**2

    def vv(self) -> Tensor:
        """(C, C) masses of H_{v_c v_c'}."""
        count, hidden, classes = len(self.inputs), self.hidden, len(self.v)
        if self.loss == "MSE":
            own = (2 / classes * hidden.T @ hidden / count).square().sum()
            return own * torch.eye(classes, dtype=own.dtype)
        p, mass = self.probabilities, self.v.new_zeros(classes, classes)
        for k in range(hidden.shape[1]):
            for other in range(k + 1):
                both = hidden[:, k] * hidden[:, other]
                entry = -(p * both[:, None]).T @ p / count
                entry.diagonal().add_(both @ p / count)
                mass += entry.square_() * (1 if k == other else 2)
        return mass

    def wv(self, inputs: Tensor | None = None) -> Tensor:
        """(m, C) masses of H_{w_i v_c}, ``inputs`` as for :meth:`ww`. CE only."""
        inputs = self.inputs if inputs is None else inputs
        p, mean, rows = self.probabilities, self.probabilities @ self.v, []
        for i in range(len(self.w)):
            factors = (p * (self.v[:, i] - mean[:, i, None]))[:, :, None] * self.hidden[
                :, None, :
            ]  # (N, C, m)
            factors[:, :, i] += self._residuals
            columns = (
                inputs.T @ (factors * self.gates[:, i, None, None]).flatten(1) / len(p)
            )  # (d, C m)
            rows.append(columns.square().sum(0).view(len(self.v), len(self.w)).sum(1))
        return torch.stack(rows)

    def wv_residual(self) -> Tensor:
        """(m, C) masses of the residual part of H_{w_i v_c} alone. CE only."""
        count = len(self.inputs)
        gated = (
            self.inputs.T @ (self._residuals * gate[:, None]) / count for gate in self.gates.T
        )  # (d, C) each
        return torch.stack([columns.square().sum(0) for columns in gated])

    @cached_property
    def _residuals(self) -> Tensor:
        return self.probabilities - nn.functional.one_hot(self.labels, len(self.v))  # (N, C)

    def problem(self, targets: Tensor | None = None) -> ht.Problem:
        """The same network and data for the package; tensors "1.weight" (W) and "3.weight" (V). MSE needs targets."""
        model = MLP(
            (self.w.shape[1], len(self.w), len(self.v)), bias=False, activation=nn.ReLU
        ).double()
        with torch.no_grad():
            model[1].weight.copy_(self.w)
            model[3].weight.copy_(self.v)
        return ht.Problem(
            model, LOSSES[self.loss], [(self.inputs, self.labels if targets is None else targets)]
        )


def worst_difference(found: Tensor, truth: Tensor) -> float:
    """The largest difference of masses, over the largest mass."""
    return float((found - truth).abs().max() / truth.abs().max())
