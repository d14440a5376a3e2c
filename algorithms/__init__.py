"""The algorithms, one page each."""
