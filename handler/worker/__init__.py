"""Boots one model within its budget, and draws: its clock, its decisions and their reasons."""
