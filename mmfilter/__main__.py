"""`python -m mmfilter`."""

import sys

from mmfilter.cli.app import main

sys.exit(main())
