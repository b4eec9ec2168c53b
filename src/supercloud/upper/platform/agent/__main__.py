"""Entry: process 1 becomes the agent's supervisor, any other process the agent itself."""

from supercloud.upper.platform.agent.init import main

main()
