"""`python -m functrain.cli` is the command `functrain`."""

import sys

from functrain.cli import main

sys.exit(main())
