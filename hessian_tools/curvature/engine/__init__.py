"""How products are computed: what is recorded, cut and recomputed so that they fit the budget."""
