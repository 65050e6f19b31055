"""Saving and restoring by several processes together: who writes what, and one verdict for all of them."""
