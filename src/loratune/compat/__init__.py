"""Names that code written for other libraries expects, over the handle; nothing is computed here."""
