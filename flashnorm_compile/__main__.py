"""``python -m flashnorm_compile``: see ``--help``."""

import sys

from .cli import main

sys.exit(main())
