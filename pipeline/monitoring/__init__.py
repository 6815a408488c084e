"""Logs, metrics and the heap of the farm's processes."""
