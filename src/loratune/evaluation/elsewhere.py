"""Text that no task of the user is about, to see what a model forgets of everything else."""

from __future__ import annotations

# Topics of Python's own documentation, which every installation holds: plain technical English.
_TOPICS = ("assignment", "calls", "class", "comparisons", "dynamic-features", "exceptions", "import", "naming", "while")
_LONGEST = 2000


def other_text() -> tuple[str, ...]:
    """A few passages of about 2 000 characters, the same for each version of Python."""
    from pydoc_data.topics import topics

    return tuple(topics[name][:_LONGEST] for name in _TOPICS if name in topics)
