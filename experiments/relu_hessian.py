"""Squared Frobenius norms of the blocks of the Hessian of f(x) = V relu(W x), in closed form.

They are known for any number of inputs. With p = softmax(f), r = p - onehot(y), h = relu(W x), g =
1[W x > 0] and A = diag(p) - p p' (cross-entropy; for the mean squared error over all N C entries A
= 2 I / C), means over the N examples:

    H_{w_i w_j}   = mean of g_i g_j (V'A V)_ij x x'
    H_{v_c v_c'}  = mean of A_cc' h h'
    H_{w_i v_ck}  = mean of g_i (A V)_ci h_k x      (Gauss-Newton)
                    + [i = k] mean of g_i r_c x     (residual)

relu'' is zero almost everywhere. Norms of means of x x' and x need nothing of the inputs but their
products, so an input that is repeated may be given once, scaled. Checked against ``ht.dense_block``
by the experiments that use it.

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
    """Masses |H_ij|_F^2 of a network's blocks.

    The blocks are w_i, the weights into hidden neuron i, and v_c, those into output c.
    """

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
        """(m, m) masses of H_{w_i w_j}.

        ``inputs`` are some columns of all inputs, if only their weights are meant.
        """
        inputs = self.inputs if inputs is None else inputs
        count = len(self.inputs)
        size = len(self.w)
        open_pairs = outer_products(self.gates)
        factors = (self._inner * open_pairs).flatten(1)  # (N, m m)
        products = (inputs @ inputs.T).square_()  # (N, N)
        return ((products @ factors) * factors).sum(0).view(size, size) / count**2

    @property
    def _inner(self) -> Tensor:
        """(N, m, m) V'A V of every example."""
        count = len(self.inputs)
        size = len(self.w)
        if self.loss == "MSE":
            return (2 / len(self.v) * self.v.T @ self.v).expand(count, size, size)
        mean = self.probabilities @ self.v  # (N, m)
        pairs = outer_products(self.v).flatten(1)  # (C, m m)
        return (self.probabilities @ pairs).view(count, size, size) - outer_products(mean)

    def vv(self) -> Tensor:
        """(C, C) masses of H_{v_c v_c'}."""
        count = len(self.inputs)
        hidden = self.hidden
        classes = len(self.v)
        if self.loss == "MSE":
            block = (2 / classes * hidden.T @ hidden / count).square().sum()
            return block * torch.eye(classes, dtype=block.dtype)
        p = self.probabilities
        mass = self.v.new_zeros(classes, classes)
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
        p = self.probabilities
        mean = p @ self.v  # (N, m)
        rows = []
        for i in range(len(self.w)):
            outer = p * (self.v[:, i] - mean[:, i, None])  # (N, C): (A V)_ci
            factors = outer[:, :, None] * self.hidden[:, None, :]  # (N, C, m)
            factors[:, :, i] += self._residuals
            gated = (factors * self.gates[:, i, None, None]).flatten(1)  # (N, C m)
            columns = inputs.T @ gated / len(p)  # (d, C m)
            rows.append(columns.square().sum(0).view(len(self.v), len(self.w)).sum(1))
        return torch.stack(rows)

    def wv_residual(self) -> Tensor:
        """(m, C) masses of the residual part of H_{w_i v_c} alone. CE only."""
        count = len(self.inputs)
        rows = []
        for gate in self.gates.T:
            columns = self.inputs.T @ (self._residuals * gate[:, None]) / count  # (d, C)
            rows.append(columns.square().sum(0))
        return torch.stack(rows)

    @cached_property
    def _residuals(self) -> Tensor:
        return self.probabilities - nn.functional.one_hot(self.labels, len(self.v))  # (N, C)

    def problem(self, targets: Tensor | None = None) -> ht.Problem:
        """The same network and data for the package; W is "1.weight", V is "3.weight".

        MSE needs ``targets``, shape (N, C).
        """
        sizes = (self.w.shape[1], len(self.w), len(self.v))
        model = MLP(sizes, bias=False, activation=nn.ReLU).double()
        with torch.no_grad():
            model[1].weight.copy_(self.w)
            model[3].weight.copy_(self.v)
        batch = (self.inputs, self.labels if targets is None else targets)
        return ht.Problem(model, LOSSES[self.loss], [batch])


def outer_products(rows: Tensor) -> Tensor:
    """(R, m, m) of (R, m)."""
    return rows[:, :, None] * rows[:, None, :]


def worst_difference(masses: Tensor, truth: Tensor) -> float:
    """The largest difference of masses, over the largest mass."""
    return float((masses - truth).abs().max() / truth.abs().max())
