"""How a model's parameters are cut into named blocks."""
