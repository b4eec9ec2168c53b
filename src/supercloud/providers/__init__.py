"""Where platforms can be had: one protocol, features with reasons."""
