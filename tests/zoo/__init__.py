"""Drawn nets of real layers with drawn histories of tasks, held against the reference.

``python -m tests.zoo --examples 500`` prints how many were compared and what disagreed.
"""
