"""The demo: LASEM on a sequence of small image tasks, from data to plots (extra ``demo``)."""
