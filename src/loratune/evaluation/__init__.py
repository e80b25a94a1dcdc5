"""What is measured on rows that were held out."""

from loratune.evaluation.answers import exact_match
from loratune.evaluation.elsewhere import other_text
from loratune.evaluation.heldout import HeldOut, held_out_batches, held_out_loss

__all__ = ["HeldOut", "exact_match", "held_out_batches", "held_out_loss", "other_text"]
