"""What every floor uses: the dimension key, the errors, dtypes, folding. Nothing here is public."""
