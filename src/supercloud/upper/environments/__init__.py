"""Kinds of execution environments, from the control plane's side."""
