"""The trainers by the names that `trainer=` takes."""

from preference_training.training.trainers import (
    TRAINERS,
    BasicTrainer,
    FSDPTrainer,
    LayerSplittingTrainer,
    TensorParallelTrainer,
)

__all__ = ["TRAINERS", "BasicTrainer", "FSDPTrainer", "LayerSplittingTrainer", "TensorParallelTrainer"]
