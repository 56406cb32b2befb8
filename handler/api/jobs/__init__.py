"""Requests to draw that outlive whoever sent them."""
