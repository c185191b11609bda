"""Device code, each with a plain reference beside it; shared by data, model and decision."""
