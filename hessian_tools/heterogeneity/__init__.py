"""How different the spectra of blocks are: readings, their errors, a verdict."""
