"""`python -m functrain` is the command `functrain`, as torchrun starts it."""

import sys

from functrain_command import main

sys.exit(main())
