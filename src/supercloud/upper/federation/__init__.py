"""Placement over providers."""
