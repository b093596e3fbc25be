"""What classifies features: by metrics, fine-tuned, to the optimum, transductive, learnt."""

from fewshot.heads.metric import (
    CosineLinear,
    Distance,
    MetaBaseline,
    NegMargin,
    RelationHead,
    class_means,
    cosines,
    matching,
    prototype,
    relation_mse,
    squared_distances,
)

__all__ = [
    "CosineLinear",
    "Distance",
    "MetaBaseline",
    "NegMargin",
    "RelationHead",
    "class_means",
    "cosines",
    "matching",
    "prototype",
    "relation_mse",
    "squared_distances",
]
