"""Naive Bayes: a class, known or not, and features that are independent given it."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.nn import PyroModule, PyroParam
from torch import Tensor, nn
from torch.distributions import constraints

from .components import Components

__all__ = ["NaiveBayes"]


class NaiveBayes(PyroModule):
    r"""A class, and blocks of features of one kind each.

    .. math::

        z ∼ \operatorname{Categorical}(π), \qquad
        y^{(j)} | z = k ∼ \text{component } k \text{ of block } j

    Data are a table, (data, features), whose columns belong to the blocks in their order:

    >>> model = NaiveBayes(BernoulliComponents(2, 5), GaussianComponents(2, 3, covariance="diag"))
    >>> model(y, labels)  # y: (data, 8)

    Labels make it semi-supervised: where a label is known, the class is that; where it is −1, and
    without labels at all, the class is summed out.

    :param blocks: each with K components over one dimension of features.
    :raises ValueError: for blocks of different K, or data and labels that do not fit them.

    Source: Nigam, McCallum, Thrun, Mitchell (2000), "Text classification from labeled and unlabeled
    documents using EM".
    """

    def __init__(self, *blocks: Components) -> None:
        super().__init__("naive_bayes")
        numbers = {block.num_components for block in blocks}
        if len(numbers) != 1 or any(len(block.event_shape) != 1 for block in blocks):
            came = [(block.num_components, tuple(block.event_shape)) for block in blocks]
            raise ValueError(
                "Blocks must have the same number of components over one dimension of features "
                f"each, but those that came have {came}."
            )
        self.num_classes = numbers.pop()
        self.sizes = [block.event_shape[0] for block in blocks]
        self.blocks = PyroModule[nn.ModuleList](blocks)
        like = next(iter(blocks[0].parameters()))
        uniform = like.new_full((self.num_classes,), 1 / self.num_classes)
        self.weights = PyroParam(uniform, constraints.simplex)
        self.register_buffer("identity", uniform.new_ones(self.num_classes).diag())

    def forward(self, y: Tensor, labels: Tensor | None = None) -> Tensor:
        self._check(y, labels)
        columns = y.split(self.sizes, -1)
        with pyro.plate("data", len(y)):
            k = pyro.sample("z", dist.Categorical(self.weights), infer={"enumerate": "parallel"})
            if labels is not None:  # a label is its class, for sure
                with poutine.mask(mask=labels >= 0):
                    certain = dist.Categorical(logits=self.identity[k].log())
                    pyro.sample("label", certain, obs=labels.clamp(min=0))
            drawn = [
                pyro.sample(f"y_{j}", block.component(k), obs=columns[j])
                for j, block in enumerate(self.blocks)
            ]
        return torch.cat([part.to(y.dtype) for part in drawn], -1)

    def _check(self, y: Tensor, labels: Tensor | None) -> None:
        if y.dim() != 2 or y.shape[1] != sum(self.sizes):
            raise ValueError(
                f"y must have shape (data, {sum(self.sizes)}), but has shape {tuple(y.shape)}."
            )
        if labels is not None and labels.shape != y.shape[:1]:
            raise ValueError(
                f"labels must have shape {tuple(y.shape[:1])}, as y has {tuple(y.shape)}, "
                f"but has shape {tuple(labels.shape)}."
            )

    def _log_joint(self, y: Tensor, labels: Tensor | None) -> Tensor:
        """ln p(z_n = k, y_n, label_n), shape (data, classes)."""
        self._check(y, labels)
        log_joint = self.weights.log()
        for block, columns in zip(self.blocks, y.unsqueeze(1).split(self.sizes, -1), strict=True):
            log_joint = log_joint + block.component(...).log_prob(columns)
        if labels is None:
            return log_joint
        classes = torch.arange(self.num_classes, device=y.device)
        excluded = (labels[:, None] >= 0) & (labels[:, None] != classes)
        return log_joint.masked_fill(excluded, -torch.inf)

    def log_evidence(self, y: Tensor, labels: Tensor | None = None) -> Tensor:
        """ln p(y_n, label_n), or ln p(y_n) where there is no label, shape (data,), in nats."""
        return self._log_joint(y, labels).logsumexp(-1)

    def responsibilities(self, y: Tensor, labels: Tensor | None = None) -> Tensor:
        """p(z_n = k | y_n, label_n), shape (data, classes)."""
        return self._log_joint(y, labels).softmax(-1)
