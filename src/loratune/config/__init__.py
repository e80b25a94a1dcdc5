"""Every setting, once: its type, default, range, help and names. Nothing here imports torch."""

from loratune.config.lora import ALL_LINEAR, NO_TARGETS, LoraConfig
from loratune.config.setting import Settings, flag_of, group_of, setting
from loratune.config.source import read_settings
from loratune.config.train import TrainConfig
from loratune.config.words import read_word

__all__ = [
    "ALL_LINEAR",
    "NO_TARGETS",
    "LoraConfig",
    "Settings",
    "TrainConfig",
    "flag_of",
    "group_of",
    "read_settings",
    "read_word",
    "setting",
]
