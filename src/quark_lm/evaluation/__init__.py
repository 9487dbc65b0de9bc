"""How good a model is, and how sure one may be: the paper's metrics, and whole evaluations built from them."""
