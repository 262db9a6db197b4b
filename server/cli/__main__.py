"""`python -m jax_engine.server.cli`: the command, where its script is not at hand."""

import sys

from jax_engine.server.cli.root import main

if __name__ == "__main__":
    sys.exit(main())
