"""Runs the command line: ``python -m rankload.launch``."""

import sys

from .cli import main

sys.exit(main())
