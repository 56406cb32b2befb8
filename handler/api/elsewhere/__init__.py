"""Models that others draw: here their requests are understood, checked, answered and kept, and drawn elsewhere."""
