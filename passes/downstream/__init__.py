"""Heads made of the captured model: blocks are found, some are chosen for a cut, copied and joined."""
