"""How many ready-made products oneDNN keeps.

For bf16 it compiles code for each shape of a product and keeps the last 1 024 of them, in two caches, about half a
megabyte each. Every step has rows of other lengths, so that a run would gather hundreds of megabytes that it hardly
reads again.
"""

from __future__ import annotations

import os

# A step has 60 shapes, and some for each size of its segments; more than that is kept for nothing.
_KEPT = "128"
_CACHES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")


def keep_few_products() -> None:
    """Bound oneDNN's cache and that of torch above it, for this process, unless its environment says how many.

    Both read the environment at their first product, so it is for the one who loads a model to say; later it has no
    effect.
    """
    for cache in _CACHES:
        os.environ.setdefault(cache, _KEPT)
