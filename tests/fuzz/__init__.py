"""Bad calls, drawn over the whole public surface, and what is asked of every one of them.

``python -m tests.fuzz --calls 10000 --seed 0`` prints the figures and exits with 1 if a message is
raw, a refused call changed something, or a call was accepted that is not known to be legal.
"""
