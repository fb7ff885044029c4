"""`python -m dppo_cli`."""

import sys

from dppo_cli.cli.main import main

sys.exit(main())
