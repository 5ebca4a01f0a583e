"""`python -m flax_mha.demo`."""

from flax_mha.demo.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
