"""FEAT (Ye et al., 2020, https://arxiv.org/abs/1812.03664, section 4): prototypes that have seen
each other.

A task's class means, a set, pass through one layer of attention, so that they attend to what tells
these classes apart; queries do not. Features are supports (tasks, ways * shots, D), all shots of
class 0 first, and queries (tasks, m, D).
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewshot import InputError
from fewshot.heads.metric import ByMeans, class_means, squared_distances


class SetAttention(nn.Module):
    """A transformer's layer on sets (..., size, D), with one head as wide as D and without a
    feed-forward part.

    It is LayerNorm(x + fc(A V)) with A = softmax(Q K' / D^½), in training with dropout of A and
    behind fc.
    """

    def __init__(self, features: int, attention_dropout: float = 0.1, dropout: float = 0.5):
        super().__init__()
        self.query, self.key, self.value = (
            nn.Linear(features, features, bias=False) for _ in range(3)
        )
        self.fc, self.norm = nn.Linear(features, features), nn.LayerNorm(features)
        self.attention_dropout, self.dropout = nn.Dropout(attention_dropout), nn.Dropout(dropout)
        for linear in (self.query, self.key, self.value):
            nn.init.normal_(linear.weight, std=features**-0.5)
        nn.init.xavier_normal_(self.fc.weight)

    def attention(self, x: Tensor) -> Tensor:
        """A (..., size, size) of sets (..., size, D); each row sums to 1."""
        return (self.query(x) @ self.key(x).mT / math.sqrt(x.shape[-1])).softmax(-1)

    def forward(self, x: Tensor) -> Tensor:
        """Sets (..., size, D) -> the same, adapted."""
        seen = self.attention_dropout(self.attention(x)) @ self.value(x)
        return self.norm(x + self.dropout(self.fc(seen)))


class FEAT(ByMeans):
    """FEAT's head. The published results need a backbone trained beforehand, and Euclidean
    distances.

    Args:
        features: D.
        temperature: divides squared distances of features as they are to prototypes as long as D^½.
        auxiliary_temperature: the same in the auxiliary loss.
        distance: "euclidean" as published, or "cosine", the product of a query as it is with
            prototypes of length 1.

    Raises:
        InputError: there is no such distance.
    """

    def __init__(
        self,
        features: int,
        temperature: float = 64.0,
        auxiliary_temperature: float = 64.0,
        distance: Literal["euclidean", "cosine"] = "euclidean",
    ):
        super().__init__()
        if distance not in ("euclidean", "cosine"):
            raise InputError(f"no distance is called {distance!r}: choose euclidean or cosine")
        self.temperature, self.auxiliary_temperature, self.distance = (
            temperature,
            auxiliary_temperature,
            distance,
        )
        self.adapt = SetAttention(features)

    def forward(self, support: Tensor, query: Tensor, ways: int) -> Tensor:
        """Logits (tasks, m, ways) of the queries."""
        prototypes = self.adapt(class_means(support, ways))
        return self._compare(query, prototypes) / self.temperature

    def auxiliary(self, support: Tensor, query: Tensor, ways: int) -> tuple[Tensor, Tensor]:
        """Logits (tasks, ways * n, ways) and labels (ways * n,) of the loss that is added in
        training: equation 7.

        All n supports and queries of a class, the queries class-major too, are a set; the mean of
        the adapted set is a centre, and each of them, not adapted, is classified among the centres.
        """
        # (tasks, ways, n, D)
        x = torch.cat([part.unflatten(1, (ways, -1)) for part in (support, query)], 2)
        logits = self._compare(x.flatten(1, 2), self.adapt(x).mean(2)) / self.auxiliary_temperature
        return logits, torch.arange(ways, device=x.device).repeat_interleave(x.shape[2])

    def _compare(self, x: Tensor, prototypes: Tensor) -> Tensor:
        if self.distance == "euclidean":
            return -squared_distances(x, prototypes)
        return x @ F.normalize(prototypes, dim=-1).mT
