"""Small networks of the suite: those that neither the package nor a library has as small ones."""
