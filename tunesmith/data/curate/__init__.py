"""One file a check: what is repeated, what is private, what the labels look like."""
