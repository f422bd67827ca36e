"""Where the Hessian's mass lies, and whether a partition follows it."""
