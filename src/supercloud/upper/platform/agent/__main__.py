"""Entry: process 1 becomes the agent's supervisor, any other process the agent itself."""

import gc

gc.disable()  # until the agent runs: imports make no garbage, and looking for it takes its time

from supercloud.upper.platform.agent.init import main  # noqa: E402

main()
