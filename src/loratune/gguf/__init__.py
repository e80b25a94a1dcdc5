"""GGUF, the format of llama.cpp: its names, its order of rows, and whole models in it."""

from loratune.gguf.model import GgufModel, compare_model, write_model
from loratune.gguf.names import ARCHITECTURES, refuse_others, tensor_names, turned
from loratune.gguf.shape import FAMILIES, Shape, refuse_family, shape_of
from loratune.gguf.vocabulary import Vocabulary, vocabulary_of

__all__ = [
    "ARCHITECTURES",
    "FAMILIES",
    "GgufModel",
    "Shape",
    "Vocabulary",
    "compare_model",
    "refuse_family",
    "refuse_others",
    "shape_of",
    "tensor_names",
    "turned",
    "vocabulary_of",
    "write_model",
]
