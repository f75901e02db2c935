"""Expectation-maximisation around an evaluator: the E-step, the posterior, the M-step's weights."""
