"""Products with the Hessian: exact, within a memory budget, verified."""
