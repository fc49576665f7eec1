"""Sources: from the raw files of a data set to samples, one module each."""
