"""The control plane's end of the agent link."""
