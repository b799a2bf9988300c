"""Names the game's buttons, apart from `world` so that a page can show them before torch is there."""

BUTTONS = ("W", "A", "S", "D", "LSHIFT", "SPACE", "R", "F", "E", "LMB", "RMB")
"""In the order of every tensor of buttons."""
