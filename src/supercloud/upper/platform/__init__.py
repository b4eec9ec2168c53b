"""The L1 platform: its image, its agent, the link to it."""
