"""The paper's experiments from the command line: configs, runs, reports (extra ``experiments``)."""
