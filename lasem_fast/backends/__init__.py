"""Implementations of a level of the tree. They never import one another."""
