"""The compiled route: the gradient traced once and differentiated forward symbolically."""
