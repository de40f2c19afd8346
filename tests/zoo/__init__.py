"""Real models of many families, tiny and with random weights, and what the compiler must do with each."""
