"""Evaluating configurations: the shared-prefix tree, whole or within a budget, and brute force."""
