"""`diff`: two adapters beside each other, from their files alone."""

from __future__ import annotations

from loratune.adapter import Difference
from loratune.adapter import diff as compare
from loratune.run.combine import Source, read_adapters


def diff(a: Source, b: Source) -> Difference:
    """How far two adapters are apart, module by module: sizes, distance, cosine, overlap of their subspaces.

    Args:
        a, b: folders of runs or adapters, or adapters as values.

    Raises:
        AdapterFileError: damaged, or modules of other shapes; every problem.
    """
    return compare(*read_adapters(a, b))
