"""The pictures of the documents. `python -m experiments.figures` draws them."""
