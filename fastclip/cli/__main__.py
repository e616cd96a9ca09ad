"""`python -m fastclip.cli`, for launchers that want a module."""

import sys

from fastclip.cli import main

sys.exit(main())
