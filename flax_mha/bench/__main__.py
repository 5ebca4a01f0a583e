"""`python -m flax_mha.bench`."""

from flax_mha.bench.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
