"""Which rows of a dataset to train on: the selector, how it is learned and applied, and simpler ways to choose."""

from .functions import SelectorFunction, initial_logits, row_weights
from .learner import SelectorLearner, SelectorOptimizer
from .penalty import PenaltyAlgorithm, PenaltySchedule, auxiliary_loss, model_loss, selection_signal
from .selector import Selection, Selector
from .streams import CyclingStream

__all__ = [
    "CyclingStream",
    "PenaltyAlgorithm",
    "PenaltySchedule",
    "Selection",
    "Selector",
    "SelectorFunction",
    "SelectorLearner",
    "SelectorOptimizer",
    "auxiliary_loss",
    "initial_logits",
    "model_loss",
    "row_weights",
    "selection_signal",
]
