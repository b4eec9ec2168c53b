"""Run as ``python3 -I -S -B main.py supercloud.upper.platform.saver``; started by the agent."""

import sys

from supercloud.upper.platform.saver.process import main

sys.exit(main())
