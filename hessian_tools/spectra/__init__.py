"""From operators to eigenvalues: probes, Lanczos, quadratures, densities."""
