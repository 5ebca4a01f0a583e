"""Other frameworks: their weights, their functions, one file each."""
