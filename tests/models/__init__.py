"""The zoo: small models with random weights, which every capture, rule and rewrite has to get right."""
