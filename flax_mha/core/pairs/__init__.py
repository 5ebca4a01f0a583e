"""Functions of a pair of query and key: traced, taken apart, bounded over blocks."""
