"""Examples: the papers' experiments rebuilt."""
