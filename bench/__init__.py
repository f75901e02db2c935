"""The benchmark suite: the library beside what a user would pick instead (``make bench``)."""
