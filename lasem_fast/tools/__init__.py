"""What EM costs: the sub-commands ``overhead``, ``plan`` and ``doctor`` (extra ``bench``)."""
