"""What classifies features: by metrics, fine-tuned, to the optimum, transductive, learnt."""

from fewshot.heads.fine_tuned import FineTuned
from fewshot.heads.metric import (
    ByMeans,
    CosineLinear,
    Distance,
    FewShotClassifier,
    Head,
    Matching,
    MetaBaseline,
    NegMargin,
    Prototype,
    RelationHead,
    SupervisedClassifier,
    class_means,
    cosines,
    matching,
    prototype,
    relation_mse,
    squared_distances,
)
from fewshot.heads.transductive import TrainingFree

__all__ = [
    "ByMeans",
    "CosineLinear",
    "Distance",
    "FewShotClassifier",
    "FineTuned",
    "Head",
    "Matching",
    "MetaBaseline",
    "NegMargin",
    "Prototype",
    "RelationHead",
    "SupervisedClassifier",
    "TrainingFree",
    "class_means",
    "cosines",
    "matching",
    "prototype",
    "relation_mse",
    "squared_distances",
]
