"""Which rows of a dataset to train on: the selector, how it is learned and applied, and simpler ways to choose."""

from .baselines import dsir_selector, mix_rows, none_selector, random_selector
from .functions import SelectorFunction, initial_logits, row_weights
from .learner import SelectorLearner, SelectorOptimizer
from .matching import Selection
from .penalty import PenaltyAlgorithm, PenaltySchedule, model_loss, selection_signal
from .selector import Selector
from .streams import CyclingStream
from .summary import summarize

__all__ = [
    "CyclingStream",
    "PenaltyAlgorithm",
    "PenaltySchedule",
    "Selection",
    "Selector",
    "SelectorFunction",
    "SelectorLearner",
    "SelectorOptimizer",
    "dsir_selector",
    "initial_logits",
    "mix_rows",
    "model_loss",
    "none_selector",
    "random_selector",
    "row_weights",
    "selection_signal",
    "summarize",
]
