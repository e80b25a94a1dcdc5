"""What is measured on rows that were held out."""

from loratune.evaluation.answers import exact_match
from loratune.evaluation.elsewhere import other_text
from loratune.evaluation.heldout import HeldOut, held_out_batches, held_out_loss
from loratune.evaluation.tasks import MEASURES, Asking, Measure

__all__ = [
    "MEASURES",
    "Asking",
    "HeldOut",
    "Measure",
    "exact_match",
    "held_out_batches",
    "held_out_loss",
    "other_text",
]
